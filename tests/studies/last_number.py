"""A lenient grader: an answer is its last number, however the sentence around it is made.

Use it with --grader tests/studies/last_number.py:last_number. It forgives form, so that a gain under it is not one of
manner; where an answer ends in another number than its result, it errs either way.
"""
import re


def last_number(problem, text):
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    if not numbers:
        return False, "no_answer"
    if float(numbers[-1]) == float(problem["answer"]):
        return True, "equal"
    return False, "different"
