"""Shared code of the method scripts: mechanics, and nothing specific to one method.

The sections can be read independently: 1 checking, 2 run, 3 processes, 4 problems and prompts, 5 sampling,
6 log-probabilities, 7 packing, 8 training, 9 rounds (scores, costs, tables); worked examples at the end.

Records are JSON lines:
  problem    {id, problem, answer, kind} and, where the data has them, solution, level, tags, choices. id is
             set/split/line of the source file, so a dropped record does not shift other problems' seeds; kind says
             how to grade: "math", "choice" (answer is a letter), "label" (answer is one of choices), "yesno".
  response   {id, draw, text, ids, tokens, finish, prompt_tokens, correct, reason}: draw counts from 0 per problem and
             round, ids are the sampled tokens without the end token ("12 7 99"), tokens is the number generated, finish
             is "stop" (ended on its own) or "length" (cut off), reason says why it is graded correct or not.
  selection  {id, ...}: every number behind the method's decision; each script lists its own.
  example    {id, prompt, completions, ids, end}: a training example. One completion for SFT, [chosen, rejected] for
             DPO; ids are the sampled tokens of each (null: tokenize its text). The loss covers the completions and
             the end token after each, never the prompt.

A run folder:
  runs/<name>/constants.json, metrics.jsonl, the source files; error.log, if something went wrong
  runs/<name>/round_<t>/*.jsonl    draws and decisions; eval.jsonl and eval.json: answers to test problems, score
  runs/<name>/round_<t>/model/     and steps.jsonl next to it: loss, norm, learning rate, seconds of each step
  runs/<name>/unfinished/          partial results of the current phase; deleted when it ends

Shapes: T tokens of a packed batch, P of them predicted, S sequences, H hidden size, V vocabulary."""
import argparse
import ast
import contextlib
import fcntl
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import unicodedata
import warnings
from collections import Counter, defaultdict, deque, namedtuple
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from fractions import Fraction
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

# 1. Checking: model output is untrusted text, so it is compared in processes that can be killed -----------------------
# This section comes first and imports nothing large because, run as a program, this file is such a process.

CHECK_SECONDS = 2  # CPU time after which a checking worker is killed; after half of that it is asked to stop
CHECK_BYTES = 2 << 30  # address space of a worker
NO_VERDICT = ("bad_gold", "cut", "timeout", "memory", "crash", "forbidden")  # reasons for "wrong" without a comparison
YES_NO = ("yes", "no")
LONG = 2000  # an answer longer than this plus twice the gold's length (characters) is wrong without a comparison
DECIMALS = 10  # decimal places to which math-verify compares numbers

# The policy. A wrong answer graded as right becomes training data, so anything doubtful is wrong. Each line is a name
# and a regular expression; <NAME> inserts the last expression of that name; indented lines continue the one before.
POLICY = r"""
# Words: LaTeX styles; the closed list of units; words that are part of a number and not a unit.
STYLE text|textbf|textit|textrm|mbox|mathrm|mathbf|boldsymbol|bm|underline|rm|bf
UNITS (?:square |cubic |sq\.? |cu\.? )?(?:dollar|USD|cent|euro|pound|inche?|feet|foot|ft|yard|yd|mile|mi|
  (?:centi|milli|kilo)?met(?:er|re)|[cmkd]m|[km]g|(?:kilo|milli)?gram|ounce|oz|lb|gallon|lit(?:er|re)|ml|second|sec|
  minute|min|hour|hr|day|week|month|year|mph|kph|unit|people|person|student|child|children|men|women|boy|girl|friend|
  kid|customer|way|time|point|step|piece|item|word|question|game|book|clip|ticket|page|card|stamp|sticker|pencil|pen|
  crayon|marble|toy|ball|balloon|shirt|chair|block|coin|can|bag|bottle|cup|pack|slice|calorie|fruit|apple|orange|
  banana|egg|cookie|cake|cupcake|muffin|animal|pet|bird|fish|dog|cat|car|wheel|tree|plant|flower)s?
ONE_UNIT (?:<UNITS>|\\(?:<STYLE>)\{ *[a-z] *\})
UNIT (?i)(.*(?:\d|[^\s\w\\,./]|\\[a-z]+|(?<![A-Za-z\\])[A-Za-z])) *(<ONE_UNIT>(?: ?(?:/|per) ?(?:<ONE_UNIT>|[a-z]))?
  (?: ?\^\{?[23]\}?)?)
SIGN %|\^\\circ
SCALES hundred|thousand|million|billion|trillion|dozen|lakh|crore|percent|per cent|pct|squared|cubed|factorial|plus|
  minus|
  times|divided|mod|or|out|half|halves|thirds|fourths|fifths|sixths|sevenths|eighths|ninths|tenths|
  twelfths|hundredths|thousandths|mil|bn|grand
# Ignored: everything up to the end of the thinking; an unclosed thought, except for an <answer> after it.
THOUGHT (?s)^(?:.*(?:</(?:think|thinking|thought|reasoning)>|<\|end_of_thought\|>))?
  (?:.*?(?:<(?:think|thinking|thought|reasoning)>|<\|begin_of_thought\|>).*?(?=<answer>[^<]*</answer>\s*\Z|\Z))?
# A box: balanced, up to eight deep; or \boxed 9. A box that explains the format does not count; several may be a list.
INSIDE (?:\\.|[^{}\\])*
INSIDE (?:\\.|[^{}\\]|\{<INSIDE>\})*
INSIDE (?:\\.|[^{}\\]|\{<INSIDE>\})*
INSIDE (?:\\.|[^{}\\]|\{<INSIDE>\})*
INSIDE (?:\\.|[^{}\\]|\{<INSIDE>\})*
INSIDE (?:\\.|[^{}\\]|\{<INSIDE>\})*
INSIDE (?:\\.|[^{}\\]|\{<INSIDE>\})*
INSIDE (?:\\.|[^{}\\]|\{<INSIDE>\})*
BOX (?s)(?<!\\)\\+(?:boxed|fbox)(?:\s*\{|\s+(?=[^\s{}$\\]))((?<=\{)<INSIDE>(?=\}|\Z)|(?<!\{)[^\s{}$\\]+)\}?
EXPLAINS_THE_BOX [\s.?]*|\\[lc]?dots|(?:\\text\{)?\s*(?:[a-z]+ ){0,4}(?:answer|result)(?: here)?[\s}.]*
SAME_LIST (?is)(?!.{0,200}\b(?:no|wait|actually|correct\w*|instead|final|answer|should|however)\b).{0,200}
# Around a box (\0): what may come before and after it, since anything else changes its content; words that revoke it;
# units, which belong to it.
BEFORE (?:(?:\A|\n)(?:[ \t>]|[-*#]+ |\w\d?[.)])*|(?<![<>])=|[:：&~]|\*\*|<[^<> ]*>|
  (?<![-+/^_$\\])(?<![^*]\*)(?:\\?\$)+|\\[(\[\\]|(?<![\\A-Za-z])[^\W\d_]{2,}|(?:[^\W\d_]|[$)\]}])[.,;]|
  \\(?:<STYLE>|begin|end)\{[^{}]*\}|
  \\(?:n|in|implies|iff|therefore|to|equiv|approx|q?quad|[a-z]*rightarrow)(?![a-z]))
DENIED \S[ \t]*-[\s$]*|\b(?:not|\w+n't|never|cannot|neither|wrong|incorrect|mistake|(?:minus|negative)(?=[ $}]*\0)|
  twice|half|double|rules? out|(?:more|less|greater|fewer|larger) than|suppose|assume|if|maybe|perhaps|possibly)
  (?: (?:be|is|it|equal|equals|to|say|the|that|final|answer|value|were|was|of))*
UNIT_BEHIND \}?(?:[ \t$~]|\\[,;!: ])*(\\?%|\^\{?\\circ\}?|°|(?:\\(?:<STYLE>)\s*\{[\s~]*(?:(?:<UNITS>|
  [a-z])(?:\s*/\s*\w+)?[\s.]*|(?:<SCALES>)\b[^{}]*)\}|
  (?:<UNITS>|<SCALES>)(?![A-Za-z]))(?:\^\{?\d\}?)?)
BEHIND (?!\Z)\}?(?:[ \t~]|\\[,;:! ])*(?:\Z|[\n$=&)"'\u3000-\uffef]|\*\*|[.,;:](?!\s*[-\d(])|!(?=\s|\Z)|
  (?<=[ \t])\(?(?:a |[^\W\d_]{2,})|<(?=[/|])|\\[)\]\\]|
  \\(?:<STYLE>|end|tag|q?quad|approx|p?mod|checkmark|[a-z]*square)(?![a-z]))
DENIED_BEHIND \}?(?:[\s$,(]|\\[)\]]|\\text\{)*(?:(?:is|was) (?:wrong|incorrect|false|not (?:correct|right|true|the))|
  (?:or|if|only|unless|except)\b|and[\s$]*(?:\w ?= ?)?[-\d\\])
UNIT_HERE \0<UNIT_BEHIND>
CHANGED (?i)\A(?![^\0]*<BEFORE>(?:[ \t]|\\[,;:! ])*\0(?:<UNIT_BEHIND>|<BEHIND>))|
  (?:<DENIED>)(?:[ \t$:}]|\\[,;!: ])*\0|\0<DENIED_BEHIND>
# Without a box: the line after ####, if it is not a heading; <answer>; then a line or sentence that states an answer
# and nothing else (then the rest), unless the rest revokes it; else the whole text, if it is one short line.
MARKED (?s)^.*####\s*((?![^\n]*[A-Za-z]{3}[^\n]*\n)[^\n]+).*$|^.*<answer>([^<]*)</answer>.*$
SAID (?ims)\A.*(?:(?:(?:^|[.!?:。]\s)[\s>*_#-]*(?:(?:so|thus|hence|therefore|then|finally|now|and|no|wait|actually|
  in conclusion)\b[,:]?\s*)*
  (?:(?:the|our|my|la|le|die)\s+)?(?:(?:correct|final|最终)\s*)*(?:answer|答案|答え|답|ответ|réponse|
  respuesta|resposta|antwort)(?: fina(?:l|le))?[\s*_]*
  (?:(?:ist?|was|must be|est?|é|:|：|是|为|=)+|\n|(?=\$|\\[\[(]))
  (?!\W*(?:correct|right|wrong|clear|reasonable)\b)[\s*_:：]*)+|
  ^[ \t]*A:(?=[ \t]*[-+$\\(.\d])\s*)
  ((?:\\\[.+?\\\]|\$\$.+?\$\$)?[^\n]*?)
  (?:(?:(?!(?<=\W[a-z])\. [^.\n]+$)[.。]|!(?! ))(?=\s|[*_]*\s*$)|<\||\n|\Z)(.*)
REVOKED (?i)\b(?:wait|however|actually|but|no|not|\w+n't|wrong|incorrect|mistake\w*|oops|sorry|correction|instead|
  rather|
  should|maybe|perhaps|unless|else|alternatively|misses|forgot|hmm|redo|re-?check\w*|recount\w*|let me|i get|false|
  contradict\w*|revised|answer:)\b|\bit(?: is|'s) (?!correct|right)|\A(?!\s*(?:since|because)\b)[^<]*\d
SHORT_LINE (?!.*\\f?box)(.{1,200})()
EXPLAINED (?i)\b(?:because|since|as (?:required|desired|claimed|wanted|expected)|exactly|(?:in (?:total|all)|
  altogether|total)\W*$|
  (?<!no, )it (?:is|does|did|has|can)$|(?<!yes, )it (?:is|does|did|has|can)(?: not|n't)$)
# A letter, possibly with its option's text; a value with a name (f(x) = 2).
LETTER (?:(?:the |correct )*(?:option|choice|answer)(?: is)?:? )?\(? ?([a-z]) ?\)?(?: ?[-.,:)]+)?(?:(?:(?<=\)) ?|
   )(.+))?
NAME_PART (?:[A-Za-z]+|\\(?:angle|triangle|overline|vec|hat|alpha|beta|gamma|delta|theta|lambda|mu|phi|omega)(?![a-z])
  \s*\{?[A-Za-z]*\}?|\\frac\{d\w\}\{d\w\})(?:_\w|_\{\w+\})?'*(?:\([^()=]*\))?
NAME \|?(?:<NAME_PART>|\(<NAME_PART>(?:, ?<NAME_PART>)*\))(?: ?[-+:] ?<NAME_PART>)*\|?
EQUALS (?<![<>!]) ?= ?(?![^{}]*\})
NAMED \s*(<NAME>)\s*(?:=|\\in(?![a-z]))\s*([^=]+)
NO_DIFFERENCE (?m)^(?:the|an?) |[^\S\n]
NUMBER [-+]?(?:\d+(?:\.\d*)?|\.\d+|\d+/0*[1-9]\d*)
VARIABLE (?<![\\A-Za-z])[A-DF-HJ-Za-df-hj-z](?![A-Za-z])
# Never sent to math-verify, which misreads them: words (as products of letters), ratios and times, several equations,
# bases, "7 8", huge factorials, fractions with them, primes, tiny numbers, a tuple as a set. Nor a number against an
# expression with a variable or a comma, because they differ.
ONLY_AS_TEXT (?m)(?<![\\A-Za-z])(?<!\\begin\{)(?<!\\end\{)(?!sqrt|frac|pi\b|sin|cos|tan|log|exp|mod\b)[A-Za-z]{3,}|
  ^[A-Za-z]{2,}$|:|=[^=\n]*,[^=\n]*=|\d_|(?<!frac )(?<!binom )\b\d+ \d|\d{3}!|\d\}?[/{]\{?\d\d!|'|
  \^T|10\^\{?-\d\d|\A\\\{[^(\n]*\n\(|\A\([^(\n]*\n\\\{[^(]*\Z|
  \A(?:<NUMBER>)\n(?!.*=).*(?:,|<VARIABLE>)|\A(?!.*=).*(?:,|<VARIABLE>).*\n(?:<NUMBER>)\Z
"""
# How an answer is rewritten before it is compared, in this order (\040 is a space).
REWRITE = r"""
[\u200b-\u200f\u202a-\u202e\u2060\ufeff] ->
[−‐–—] -> -
∞ -> \\infty\040
° -> ^\\circ\040
^\s*(-?) ?\\?\$ ?(-?[\d.,{}\\!]*\d)\s*$ -> \1\2 dollar
√ *([0-9]+|[a-z]|\([^()]*\)) -> \\sqrt{\1}
\u2044 -> /
(?<=\d)(?:,?\\!\s*|\{,\}|')+(?=\d{3}) ->
(?<!\\)\\(?:text)?color\s*\{\w*\}|(?<!\\)\\[()\[\]]|\\?\$|\\displaystyle(?![a-z])|\\(?:left|right)(?![a-z])|\\!|
  \*\*|[€£]|\\(?:bf|rm)(?![a-z]) ->
\\q?quad(?![a-z])|(?<!\\)\\[,;:> ]|~|\s+ -> \040
 ?\\times ?(?=10) -> \\cdot
\\varnothing(?![a-z]) -> \\emptyset
^\s*\\f?boxed\s*\{(.*)\}\s*$ -> \1
\\langle(?![a-z]) -> (
\\rangle(?![a-z]) -> )
\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|boldsymbol|bm|underline|
  operatorname)\s*\{\s*([^{}\s][^{}]*[^{}\s]|[^{}a-z\s])\s*\} -> \040\1\040
\\(?:text|mbox|mathrm|rm)\s*\{ ?([a-z]) ?\} -> \\text{\1}
[ ]+ -> \040
(?<=\d) (?=\d{3}(?![\d/])) ->
(?<=\d),(?=\d{3}\}|(?:\d{2,3},)*\d{3}(?:\.\d+)?(?: [a-z ]+)?$) ->
(?i)(?<=\d) *(?:percent(?:age)?|pct)\b -> \\%
(=.+?),? for (?:all|any|every|some) (?:real |constant )*\\?[a-z]?(?: *\\in *\\mathbb\{R\})?$ -> \1
(?i)(?<=\d) *degrees?\b -> ^\\circ
(?<=\d) to (?=\d) -> :
,? *\b(?:and|or)\b,? * -> ,\040
>= -> \\geq\040
<= -> \\leq\040
!= -> \\neq\040
^\s*(-?\d+) (\d+) ?/ ?(\d+)(?!\d) -> \1\\frac{\2}{\3}
^\s*(-?[\d.]+)[eE]([+-]?\d+)(?= |$) -> \1\\cdot10^{\2}
^\s*(\d+) out of (\d+)\s*$ -> \\frac{\1}{\2}
(\d)_\{?10\}?\s*$ -> \1
(\d)_\{(\w+)\} -> \1_\2
\{-\} -> -
\\[dt]frac -> \\frac
^\s*(-?) ?\\frac ?\{?(\d+)\}? ?\{(\d+)\}\s*$ -> \1\2/\3
^((\w+) ?= ?[^=]+), \2 ?= ? -> \1,\040
^((\w+) ?= ?[^=]+), \2 ?= ? -> \1,\040
^[=+\s]+|(?:[.,;:\s]|\\\\)+$ ->
^x ?= ?([^=,]+), ?y ?= ?([^=,]+)$ -> (\1,\2)
^y ?= ?([^=,]+), ?x ?= ?([^=,]+)$ -> (\2,\1)
(?i)^true$ -> yes
(?i)^false$ -> no
"""
REWRITES = [line.split(" ->") for line in REWRITE.replace("\n  ", "").strip().splitlines()]
RULES = {}
for line in POLICY.replace("\n  ", "").splitlines():
    name, _, pattern = line.partition(" ")
    RULES[name] = re.compile(re.sub("<([A-Z_]+)>", lambda other: RULES[other[1]].pattern, pattern))


def last_boxed(text):
    r"""Return the content of the last \boxed{...} (or \boxed 9; to the end if never closed), or None. Linear time."""
    boxes = [None, *RULES["BOX"].findall(text)]
    return boxes[-1]


def final_answer(text):
    """Return the answer that a response states, verbatim; None if it states none or if in doubt."""
    text = RULES["THOUGHT"].sub("", text)
    boxes = [box for box in RULES["BOX"].finditer(text) if not RULES["EXPLAINS_THE_BOX"].fullmatch(box[1])]
    if boxes:
        return boxed_answer(text, boxes)
    text = RULES["MARKED"].sub(r"\1\2", text).strip()
    stated = RULES["SAID"].search(text) or RULES["SHORT_LINE"].fullmatch(text)
    if not stated or RULES["REVOKED"].search(stated[2]) or "?" in stated[1]:
        return None
    return RULES["EXPLAINED"].split(stated[1])[0].rstrip(" ,(") or None


def boxed_answer(text, boxes):
    r"""Return the answer in the last of these boxes, with a unit that follows it, or in the last several if they form a
    list ("5, 6"); None if mathematics or words around it change it."""
    last = boxes[-1]
    answers = [box[1] for box in boxes[-9:] if RULES["SAME_LIST"].fullmatch(text[box.end():last.start()])]
    if len(set(answers)) > 1:
        return ", ".join(answers)
    around = f"{text[:last.start()][-100:]}\0{text[last.end(1):][:100]}"
    if RULES["CHANGED"].search(around):
        return None
    return " ".join([last[1], *RULES["UNIT_HERE"].findall(around)])


@functools.lru_cache(1 << 14)
def rewritten(answer):
    """Rewrite an answer for comparison: reword what math-verify cannot read or misreads."""
    answer = re.sub("([⁻⁰¹²³⁴-⁹]+)", r"^{\1}", re.sub("(?=[¼-¾⅐-⅞])", " ", answer))
    answer = unicodedata.normalize("NFKC", answer)
    for pattern, by in REWRITES:
        answer = re.sub(pattern, by.strip(), answer)
    return answer


def plain(text):
    """Return a letter, a label or an option's text in lower case, without LaTeX and quotes."""
    return rewritten(text).strip('{}" ').casefold()


def letter_of(answer, options=()):
    """Return the letter of the option that an answer names: by its letter ("B", "(b)", "option B"), its text, or both
    ("B. a dog"); None if it names no option, or two. Without options, any letter counts."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    mark = RULES["LETTER"].fullmatch(plain(answer))
    for letter, option in zip(letters, options or letters):
        if mark and mark[1] == letter.lower() and mark[2] in (None, plain(option)):
            return letter
    label = label_of(answer, options)
    return letters[options.index(label)] if label else None


def label_of(answer, labels):
    """Return the label that an answer equals; None if it is anything else or says more ("not neutral")."""
    same = [label for label in labels if plain(label) == plain(answer)]
    return same[0] if len(same) == 1 else None


def grade(problem, text, equal):
    """Grade a response: (correct, reason). equal(gold, answer) compares answers whose texts alone do not decide."""
    answer, kind = final_answer(text), problem.get("kind", "math")
    gold = problem["answer"].strip()
    if "box" in gold:
        gold = final_answer(gold) or gold
    if kind != "math":
        meant_by = letter_of if kind == "choice" else label_of
        options = problem.get("choices", YES_NO if kind == "yesno" else ())
        gold, answer = meant_by(gold, options), meant_by(answer or "", options)
    if not gold:
        return False, "bad_gold"
    if not answer:
        return False, "no_answer"
    correct = answer == gold
    if kind == "math" and not correct:
        correct = same_value(gold, answer, equal)
    return correct, "equal" if correct else "different"


def undecided(gold, answer):
    raise ValueError("only math-verify can tell")


def canonical(answer):
    """Return (answer, unit) for comparing mathematical answers. A sign such as % also stays in the answer."""
    answer = rewritten(answer)
    unit = RULES["UNIT"].fullmatch(answer)
    if unit:
        return unit[1], unit[2].casefold().rstrip("s")
    signs = RULES["SIGN"].findall(answer)
    return answer, "".join(signs[:1])


def same_value(gold, answer, equal):
    """Return whether two mathematical answers are equal, decided from their texts as far as possible."""
    if len(answer) > LONG + 2 * len(gold):
        return False
    (gold, unit), (answer, its_unit) = canonical(gold), canonical(answer)
    if unit and its_unit and unit != its_unit:
        return False
    (name, value), (its_name, its_value) = named(gold), named(answer)
    if name == its_name or "=" not in gold or "=" not in answer:
        gold, answer = value, its_value
    elif name not in answer or its_name not in gold:
        return False
    both = f"{gold}\n{answer}"
    text, its_text = map(in_order, RULES["NO_DIFFERENCE"].sub("", both.casefold()).split("\n"))
    if text == its_text or RULES["ONLY_AS_TEXT"].search(both):
        return text == its_text
    if RULES["NUMBER"].fullmatch(text) and RULES["NUMBER"].fullmatch(its_text):
        return Fraction(text) == Fraction(its_text)
    sides = [answer]
    if "=" not in gold:  # "m + n = 256 + 37 = 293" has two
        sides = [side for side in RULES["EQUALS"].split(answer) if not RULES["NAME"].fullmatch(side)] or sides
    return all(equal(gold, side) for side in sides)


def named(answer):
    """Return (name, value) of "x = 3" or "f(2) = 3", and ("", answer) of anything else."""
    found = RULES["NAMED"].fullmatch(answer)
    return found.groups() if found else ("", answer)


def in_order(answer):
    """Sort equations by name: "y=2,x=3" becomes "x=3,y=2"."""
    parts = answer.split(",")
    if all("=" in part for part in parts):
        return ",".join(sorted(parts))
    return answer


def math_verify_grader():
    """Return grade(problem, text), using math-verify where texts do not decide: on boxed answers from `rewritten`."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=NormalizationConfig(
        malformed_operators=True, nits=True))]  # not units, which we drop ourselves

    @functools.lru_cache(1 << 10)
    def parsed(answer):
        return parse(f"\\boxed{{{answer}}}", extraction_config=config, parsing_timeout=None)

    @functools.lru_cache(1 << 15)
    def equal(gold, answer):
        return verify(parsed(gold), parsed(answer), float_rounding=DECIMALS, allow_set_relation_comp=True,
                      timeout_seconds=None)

    equal("1", "\\frac{2}{2}")  # builds the parser
    return functools.partial(grade, equal=equal)


class Checker:
    """Grade responses in worker processes, with math-verify or your own grader. Workers that hang are replaced."""

    def __init__(self, workers, grader=""):
        self.grader = grader
        self.threads = ThreadPoolExecutor(workers)  # each waits for its own process, which does the work
        self.own = threading.local()
        self.works = False  # a grader that has only crashed so far ends the program
        if grader:
            self.submit({"id": "check/1", "problem": "1 + 1 = ?", "answer": "2", "kind": "math"}, "\\boxed{2}").result()
            self.works = False  # it may still crash on real problems

    def submit(self, problem, text, finish="stop"):
        """Return a future of (correct, reason): equal, different, no_answer, one of NO_VERDICT, or a grader's own."""
        if finish == "length":
            return given((False, "cut"))
        if not self.grader:
            try:
                return given(grade(problem, text, undecided))
            except ValueError:  # texts alone do not decide
                pass
        return self.threads.submit(self.ask, problem, text)

    def ask(self, *case):
        """Get (correct, reason) from this thread's worker."""
        for _ in range(2):  # a worker may have been killed for a reason unrelated to the case
            worker = self.worker()
            late = threading.Timer(10 * CHECK_SECONDS, worker.kill)
            late.start()
            try:
                print(json.dumps(case), file=worker.stdin, flush=True)
                correct, reason, error = json.loads(worker.stdout.readline())
                break
            except (OSError, ValueError):  # it is dead
                worker.wait()
                correct, reason, error = False, "crash", "its process died"
            finally:
                late.cancel()
        if self.grader and reason == "crash" and not self.works:
            raise RuntimeError(f"--grader {self.grader}: {lines_of(error)[-1]}\n{error}")
        self.works = True
        return correct, reason

    def worker(self):
        """Return this thread's worker; start one (a second or two) if there is none."""
        worker = getattr(self.own, "worker", None)
        if worker is None or worker.poll() is not None:
            worker = subprocess.Popen(
                [sys.executable, "-B", __file__, self.grader], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True)
            line = worker.stdout.readline().strip()
            if line != "ready":  # several threads may get here at once, so raise for the main one instead of printing
                raise RuntimeError(f"a checking worker failed to start: {line}")
            self.own.worker = worker
        return worker


def given(verdict):
    """Wrap a known verdict in a finished future, the form in which the checker returns verdicts."""
    future = Future()
    future.set_result(verdict)
    return future


class Stop(BaseException):
    """A case ran out of time or tried something no comparison needs. Not an Exception, because sympy catches those."""


def late(*_):
    raise Stop("timeout")


def refuse(event, arguments):
    """Audit hook: keep this process from writing files, starting programs or opening connections.

    sympy evaluates its reading of some texts as Python (only numbers and names, as far as we know). If more gets
    through, it can do little: it can still read files, and C code can do anything that the kernel allows."""
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or re.match(r"(?:os\.(?!listdir|scandir)|subprocess|socket|ctypes|pty|tempfile|fcntl|mmap|sqlite3)",
                          event):
        raise Stop("forbidden")


def checking_worker(grader=""):
    """Run a worker: print "ready", then for each JSON line [problem, text] a line [correct, reason, error]."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing a library prints is taken for a verdict
    resource.setrlimit(resource.RLIMIT_AS, (CHECK_BYTES, CHECK_BYTES))
    signal.signal(signal.SIGPROF, late)
    try:
        if grader:  # file.py:function
            path, _, function = grader.rpartition(":")
            compare = runpy.run_path(path)[function]
        else:
            compare = math_verify_grader()
    except Exception as error:  # a user's file may raise anything
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=out, flush=True)
        return
    if not grader:
        for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):  # the latter does not apply to root
            resource.setrlimit(limit, (0, 0))
        sys.addaudithook(refuse)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(in_time(compare, *json.loads(line))), file=out, flush=True)


def in_time(compare, *case):
    """Return (correct, reason, error) within limited CPU time, so a verdict does not depend on what else runs here."""
    signal.setitimer(signal.ITIMER_VIRTUAL, CHECK_SECONDS)  # kills the process: a huge power cannot be interrupted
    try:
        try:
            signal.setitimer(signal.ITIMER_PROF, CHECK_SECONDS / 2, 0.1)  # again, in case sympy swallows the first
            correct, reason = compare(*case)
        finally:  # not later, because freeing the memory of a late case takes time too
            signal.setitimer(signal.ITIMER_PROF, 0)
        return bool(correct), str(reason), ""
    except Stop as stop:
        signal.setitimer(signal.ITIMER_PROF, 0)  # in case it fired on that very line
        return False, str(stop), ""
    except Exception:  # untrusted text in a symbolic parser: any failure is a wrong answer and is counted
        return False, "crash", traceback.format_exc()


if __name__ == "__main__":  # run as a program, this file is such a worker, which does not need the rest (torch)
    checking_worker(*sys.argv[1:])
    sys.exit()

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # else memory is lost to fragmentation
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else two concurrent runs spin and slow to a crawl
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed import get_node_local_rank, get_rank as rank, get_world_size as world_size
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

if not torch.cuda.is_available():  # vllm's wheel pulls in CUDA builds of these, which break transformers on a CPU torch
    for package in ("torchvision", "torchaudio", "torchcodec"):
        sys.modules.setdefault(package, None)
from transformers import (AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer,  # noqa: E402
                          DynamicCache, GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
from transformers.cache_utils import DynamicLayer  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

disable_progress_bar()


# 2. Run: constants from the command line, a folder with all results, phases that run once -----------------------------

FLAG_TYPES = (int, float, str, tuple, list)  # constants of these types have flags (where a tuple becomes a list)
MACHINE = ("NAME", "DATA", "ENGINE", "EAGER", "SEEDED", "GPU_MEMORY", "MAX_TOKENS", "RECOMPUTE", "COMPILE",
           "SAVE_MINUTES", "KEEP_MODELS", "KEEP", "WANDB")
MAY_DIFFER = {*MACHINE, "ROUNDS"}  # constants that a rerun may change


def launch(main, g):
    """Run a script: parse its flags, then call main(). An exception prints one line; its traceback goes to error.log.

    g is the script's globals(). The process ends at once because vLLM's finalizers may abort after a successful run."""
    status = 1
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that cannot show all characters
    try:
        override_from_cli(g)
        main()
        status = 0
    except SystemExit as stop:  # from fail or --help
        status = stop.code
    except KeyboardInterrupt:
        status = 130
        print_error("stopped; finished phases are kept, and the same command resumes")
    except Exception as error:
        log = Run.folder / "error.log"
        with contextlib.suppress(OSError):  # the disk may be what failed
            log.write_text(traceback.format_exc())
        print_error(f"error: {type(error).__name__}: {lines_of(error)[0]} ({log}); finished phases are kept; fix the "
                    "problem and run the same command again")
    if Run.wandb:
        Run.wandb.finish(exit_code=status)
    sys.stdout.flush()
    os._exit(status)


def fail(message, status=1):
    """End the program with one line on standard error, for errors that a user can fix."""
    print_error(f"error: {message}")
    sys.exit(status)


def print_error(message):
    """Print one line on standard error, from the first process unless another one fails alone."""
    if get_node_local_rank(0) > 0:
        time.sleep(5)  # by then the first process has printed it, and torchrun has ended this one
    print(f"{Path(sys.argv[0]).name}: {printable(message)}", file=sys.stderr, flush=True)


def lines_of(error):
    """Return the lines of an exception's message, at least one."""
    return str(error).strip().splitlines() or [repr(error)]


def comments_of(script):
    """Return {name: (heading above it, comment after it)} of the upper-case constants at the top level of a script."""
    comments = {}
    heading = "Constants"  # of a script that has none
    for line in Path(script).read_text().splitlines():
        constant = re.match(r"([A-Z][A-Z0-9_]*) = .*?(?:  # (.*))?$", line)
        if constant:
            comments[constant[1]] = heading, constant[2] or ""
        elif line.startswith("# "):
            heading = line.strip("#- ")
    return comments


def constants_of(g):
    """Return {name: value} of a script's constants that have flags, as they are in JSON (a tuple is a list)."""
    constants = {name: g[name] for name in comments_of(g["__file__"]) if isinstance(g.get(name), FLAG_TYPES)}
    return json.loads(json.dumps(constants))


def override_from_cli(g):
    """Turn each constant of a script into a flag and apply the command line; `g` is the script's globals().

    The default sets the type, the comments set the help and its groups. --toy applies TOY first. LEGAL lists the legal
    values of a constant, or its minimum; for other numbers that is 0. A wrong flag ends the program with status 2."""
    parser = argparse.ArgumentParser(description=g["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)  # absent flags set nothing
    parser.error = lambda message: fail(f"{message}; --help lists all flags", status=2)
    if "TOY" in g:
        parser.add_argument("--toy", action="store_true", help="laptop size: apply TOY, then the other flags")
        if "--toy" in sys.argv:
            g.update(g["TOY"])
    comments = comments_of(g["__file__"])
    groups = {}
    for name, default in constants_of(g).items():
        options = {"type": type(default)}
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        elif default == []:
            options = {"nargs": "+"}
        elif isinstance(default, list):
            options = {"nargs": len(default), "type": type(default[0])}
        heading, comment = comments[name]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        toy = f"; toy {g['TOY'][name]}" if name in g.get("TOY", ()) else ""
        explained = f"{comment} [{default}{toy}]".replace("%", "%%")
        groups[heading].add_argument(flag_of(name), dest=name, help=explained, **options)
    g.update(vars(parser.parse_args()))
    for name, value in constants_of(g).items():
        legal = g["LEGAL"].get(name, 0)
        if isinstance(legal, tuple) and value not in legal:
            fail(f"{flag_of(name)} {value!r}: choose from {legal}", status=2)
        if isinstance(value, (int, float)) and not legal <= value < math.inf:
            fail(f"{flag_of(name)} {value}: must be finite and at least {legal}", status=2)


def flag_of(name):
    """Return the flag of a constant: --n-train for N_TRAIN."""
    return "--" + name.lower().replace("_", "-")


def prepare(g, *more_problems, models=()):
    """Load everything that a method script's constants name, and open its run folder.

    Return (run, tokenizer, problems to train on, tests); tests is {"test": problems, "held_out": problems}, without
    empty entries. more_problems and models are other inputs that affect results. Bad input ends the program here."""
    for name in MACHINE:  # a fork that lacks one must fail everywhere, not only on a GPU
        if name not in g:
            fail(f"the constant {name} is missing; copy it from dast.py, under # Machine")
    tokenizer = load_tokenizer(g["MODEL"], g["PROMPT"], g["SYSTEM"], g["THINK"])
    problems = load_problems(g["TRAIN_DATA"], "train", g["DATA"], g["N_TRAIN"])
    problems, held_out = hold_out(problems, g["HELD_OUT"], g["SEED"])
    tests = {}
    if g["TEST_DATA"] or not held_out:
        tests["test"] = load_problems(g["TEST_DATA"], "test", g["DATA"], g["N_TEST"])
    if held_out:
        tests["held_out"] = held_out
    scored = sum(tests.values(), [])
    longest = max(problems + scored, key=lambda p: len(p["problem"]))
    check_length(longest, encode(tokenizer, longest["problem"]), g["MAX_NEW_TOKENS"], context_of(g["MODEL"]))
    run = start_run(g, problems, scored, *more_problems, models=models)
    say(f"  data     {len(problems):,} training problems, {len(scored):,} to score models on")
    both = {p["problem"] for p in problems} & {p["problem"] for p in scored}
    if both:
        say(f"warning: {len(both):,} test problems are also training problems")
    gigabytes = 4e-9 * count_parameters(g["MODEL"])
    say(f"  disk     {gigabytes:.3g} GB for each round's model (--keep-models); training may need six times that")
    run.once(f"max_tokens_{world_size()}.json", tokens_that_fit, run)
    return run, tokenizer, problems, tests


def start_run(g, *problem_sets, models=()):
    """Join the other processes, open runs/<NAME>, print the header and return the Run.

    Constants, problems, models and code must match those that the folder was made with, on all nodes; otherwise end the
    program and list the differences. MAY_DIFFER names the constants that may change, --keep accepts changed code."""
    script = Path(g["__file__"])
    constants = constants_of(g)
    constants["problems or models"] = fingerprint(problem_sets, [*constants["MODEL"].split(","), *models])
    sources = [script, Path(__file__)]
    if constants["GRADER"]:  # file.py:function
        sources.append(Path(constants["GRADER"].rpartition(":")[0]))
    code = {path.name: code_of(path, constants) for path in sources}
    setup()
    machine = f"{world_size()} x {processor()}, {threads_per_process()} cores each"
    name = constants["NAME"] or f"{script.stem}-{constants['SEED']}"
    Run.folder = Path("runs") / gather(name)[0]
    path = Run.folder / "constants.json"
    about = None
    if rank() == 0:
        Run.folder.mkdir(parents=True, exist_ok=True)
        Run.lock = lock_folder(Run.folder)
        if path.exists() and any(kept.stat().st_size for kept in Run.folder.glob("*/*")):
            about = read(path)
        else:
            about = {"script": script.name, "constants": constants | {"ENGINE": engine_for(constants["ENGINE"])},
                     "code": [], "command": sys.argv, "machine": machine,
                     "versions": {package.name: package.version for package in distributions()}}
    about = gather(about)[0]
    kept = [code, *about["code"]][-1]
    if constants["KEEP"]:
        kept = code
    changes = changes_of(about["constants"] | kept, constants | code)
    for node, of_node in gather((platform.node(), changes)):
        if of_node:
            fail(f"{Run.folder} was made by {about['script']} with different constants or code than {node} has now "
                 f"({of_node}); choose a different --name, or the old values, or --keep to resume with the new code; "
                 "all nodes need the same command, source files, problems and models")
    if rank() == 0 and about["code"][-1:] != [code]:
        keep_code(about["code"], sources)
        write(path, about | {"code": [*about["code"], code]})
    await_file(path)
    constants["ENGINE"] = constants["ENGINE"] or about["constants"]["ENGINE"]
    run = Run(constants)
    say(f"{script.name} {'resumes' if run.metrics else 'starts'} in {run.folder}\n"
        f"  model    {constants['MODEL']}\n"
        f"  machine  {machine}\n"
        f"  sampler  {constants['ENGINE']}\n"
        f"  seed     {constants['SEED']}")
    return run


def engine_for(wanted):
    """Return a new run's engine: the wanted one, else vLLM if it is installed and there is a GPU, else transformers."""
    installed = find_spec("vllm")
    if wanted == "vllm" and not installed:
        fail("--engine vllm needs the package vllm: pip install -r requirements.txt")
    if wanted:
        return wanted
    if installed and torch.cuda.is_available():
        return "vllm"
    if installed:
        say("vLLM is installed; if this is its CPU build, --engine vllm may sample several times as fast")
    return "transformers"


def keep_code(versions, sources):
    """Copy the source files into the run folder: as dast.py, or with earlier `versions` as dast.1.py, dast.2.py."""
    for path in sources:
        name = f"{path.stem}.{len(versions)}.py" if versions else path.name
        shutil.copyfile(path, Run.folder / name)


def fingerprint(problem_sets, models):
    """Hash what a run reads: its problems and the beginning of each weight file."""
    contents = [problem_sets]
    for model in models:
        contents += [path.open("rb").read(2**20) for path in weight_files(model)]
    return f"{seed_of(contents):x}"


def code_of(path, constants):
    """Hash a program, ignoring comments, docstrings and the values of `constants` and TOY."""
    text = ast.unparse(ast.parse(path.read_text()))  # without comments, each constant on one line
    names = "|".join([*constants, "TOY"])
    text = re.sub(rf'(?m)^(?:{names}) = .*|^ *"""(?s:.*?)"""\n', "", text)
    return f"{seed_of(text):x}"


def changes_of(old, new):
    """Describe how two dictionaries differ, apart from MAY_DIFFER."""
    changes = []
    for name in sorted({*old, *new} - MAY_DIFFER):
        if old.get(name) != new.get(name):
            changes.append(f"{name} {old.get(name, 'absent')!r} -> {new.get(name, 'absent')!r}")
    return "; ".join(changes)


def await_file(path, seconds=120):
    """Wait until this process sees a file that rank 0 has made, because a network disk may lag by a minute."""
    for _ in range(seconds):
        if path.exists():
            return
        time.sleep(1)
    fail(f"{path}: rank 0 has made it, but {platform.node()} does not see it; all nodes need the same runs/ on a "
         "shared disk")


def lock_folder(folder):
    """Lock a run folder until this program ends; return the open file that holds the lock."""
    lock = open(folder / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder} is in use by another program; wait until it ends or choose a different --name")
    return lock


class Run:
    """A run folder runs/<name>. Finished phases are kept, so a rerun resumes after the last complete phase."""

    folder = Path()  # where error.log goes: the current folder until there is a run
    wandb = None

    def __init__(self, constants):
        self.unfinished = self.folder / "unfinished"
        self.constants = constants
        self.seed = constants["SEED"]
        self.checker = Checker(min(8, threads_per_process()), constants["GRADER"])
        self.engine = VllmEngine(self) if constants["ENGINE"] == "vllm" else TransformersEngine(self)
        path = self.folder / "metrics.jsonl"
        lines = read(path) if path.exists() else []
        self.metrics = {(line["round"], line["phase"]): line for line in lines}
        if constants["WANDB"] and rank() == 0:
            import wandb
            name = self.folder.name
            Run.wandb = wandb.init(project="self-training", name=name, config=constants, resume="allow",
                                   id=f"{name}-{constants['problems or models'][:8]}")  # the same in a rerun

    def once(self, name, make, *arguments, **options):
        """Return the contents of runs/<run>/<name>. If it does not exist, call make(*arguments, **options) first.

        If name ends in .jsonl or .json, make returns the records or the object (rank 0's are written). Any other name
        is a folder, which make fills as <name>.part; its path is returned. What is unfinished ends in .part."""
        path = self.folder / name
        half = path.with_name(path.name + ".part")
        if not gather(path.exists())[0]:
            if rank() == 0 and not path.suffix:
                shutil.rmtree(half, ignore_errors=True)
                half.mkdir(parents=True)
            made = make(*arguments, **options)
            if rank() == 0:
                if path.suffix:
                    write(path, made)
                else:
                    publish(half)
                if path.parent != self.folder:  # files outside the round folders are made within a phase
                    shutil.rmtree(self.unfinished, ignore_errors=True)
            barrier()
        await_file(path)
        return read(path) if path.suffix else str(path)

    def rng(self, *key):
        """Return a numpy generator that depends only on the seed and `key` (round, problem id, draw, ...)."""
        return np.random.default_rng(seed_of(self.seed, *key))

    def log(self, round, phase, **values):
        """Record the metrics of one phase of one round in metrics.jsonl; a repeated phase replaces its line."""
        self.metrics[round, phase] = {"round": round, "phase": phase, **values}
        if rank() == 0:
            write(self.folder / "metrics.jsonl", self.metrics.values())
        if self.wandb:
            self.wandb.log({f"{phase}/{name}": value for name, value in values.items()} | {"round": round})


def report(run, round, phase, **values):
    """Log the metrics of a phase and print them: single values on one line, dictionaries as rows of a table."""
    run.log(round, phase, **values)
    rows = {name: value for name, value in values.items() if isinstance(value, dict)}
    others = {name: value for name, value in values.items() if name not in rows}
    say(f"  round {round}  {phase:<9} {text_of(others)}")
    print_rows(rows)


def print_rows(rows):
    """Print {name: {column: number or text}}, all with the same columns, as a table."""
    if not rows:
        return
    width = max(map(len, rows))
    columns = next(iter(rows.values()))
    header = {column: column for column in columns}
    for name, row in {"": header, **rows}.items():
        cells = [f"  {written(value):>{max(8, len(column))}}" for column, value in row.items()]
        say(f"           {name:<{width}}" + "".join(cells))


def text_of(values):
    """Format names and values on one line: draws 1,200, correct 0.45."""
    return ", ".join(f"{name} {written(value)}" for name, value in values.items())


def written(value):
    """Format a number or text for printing."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value


def phase(make):
    """Turn make(run, file, ...) into a phase: if `file` exists in the run folder, it is read, not made again."""
    @functools.wraps(make)
    def made_once(run, file, *arguments, **options):
        return run.once(file, make, run, file, *arguments, **options)
    return made_once


def round_and_phase(file):
    """Return (1, "probe") for "round_1/probe.jsonl", and (0, the path without its extension) outside the rounds."""
    round, phase = re.fullmatch(r"(?:round_(\d+)/)?(.*?)(?:\.jsonl?)?", file).groups(default=0)
    return int(round), phase


def seed_of(*key):
    """Hash any key to a number below 2^63, the same on every machine and in every process (unlike hash())."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def read(path):
    """Return the records of a .jsonl file, or the object in a .json file."""
    with open(path) as file:
        try:
            return [json.loads(line) for line in file] if path.suffix == ".jsonl" else json.load(file)
        except ValueError as error:
            fail(f"{path} is damaged ({error}); remove it and what was made after it, then run the same command again")


def write(path, value):
    """Write a file for `read` under a temporary name, then rename it, so a file is either complete or absent."""
    half = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(half, "w") as file:
        lines = map(json.dumps, value) if path.suffix == ".jsonl" else [json.dumps(value, indent=1)]
        file.writelines(line + "\n" for line in lines)
    publish(half)


def publish(half):
    """Flush a complete file or folder to disk, then drop .part from its name."""
    for path in (*half.rglob("*"), half):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    half.rename(half.with_suffix(""))


def torn_lines(folder, name):
    """Yield the JSON lines that earlier starts left in the files `name` (a glob), except any that a kill cut short."""
    for path in sorted(folder.glob(name)):
        for line in open(path, errors="replace"):
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def write_line(file, record):
    """Append a record for torn_lines, starting on a new line because a kill may have cut the last one short."""
    file.write("\n" + json.dumps(record) + "\n")
    file.flush()


def by_problem(records):
    """Return {id: its records, in order}."""
    groups = defaultdict(list)
    for record in records:
        groups[record["id"]].append(record)
    return groups


def outcomes_of(responses):
    """Return one problem's draws as numbers: 1 is correct, 0 wrong, -1 cut off at the length limit."""
    return [-1 if response["finish"] == "length" else int(response["correct"]) for response in responses]


def spread_evenly(total, n, rng):
    """Spread `total` over n places as evenly as possible, (n,); the remainder goes to random places."""
    counts = [total // n] * n
    for i in rng.permutation(n)[:total % n]:
        counts[i] += 1
    return counts


# 3. Processes: the same under torchrun and plain python ---------------------------------------------------------------

def setup():
    """Join torchrun's process group if there is one, else create a group of this process alone."""
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    elif Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        fail("there is a GPU, but torch cannot use it: its driver is too old for this torch, or torch is a CPU build "
             "(to train on the CPU anyway, set CUDA_VISIBLE_DEVICES='')")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    options = {}
    if "RANK" not in os.environ:
        options = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # A barrier may wait for a whole sampling phase; torchrun notices a dead process, so a long timeout is safe
    dist.init_process_group(backend, timeout=timedelta(days=7), **options)


def give_memory_back():
    """Free unused memory: Python's (the parts of a graph refer to one another) and the GPU's."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def device():
    """Return this process's GPU, or the CPU."""
    return torch.device("cuda", get_node_local_rank(0)) if torch.cuda.is_available() else torch.device("cpu")


def processor():
    """Return the name of the GPU, or "CPU"."""
    return torch.cuda.get_device_name() if device().type == "cuda" else "CPU"


def threads_per_process():
    """Return how many cores one process may use; more threads than cores spin and are 60 times slower (measured)."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def say(text=""):
    """Print on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), flush=True)


def printable(text):
    """Escape control characters in a model's text, which could move the terminal's cursor, or worse."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
                  lambda m: m[0].encode("unicode_escape").decode(), text)


def barrier():
    """Wait for the other processes."""
    dist.all_reduce(torch.zeros(1))  # a CPU tensor, because gloo waits without spinning, whatever the device


def gather(item):
    """Return every process's `item`, on every process, as a list in rank order."""
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def bar(total, what, batch=1):
    """Return a progress bar, shown on rank 0; without a terminal it prints one line a minute. It moves by batches,
    because a batch's first answer would count the time of all of them as its own."""
    tqdm.monitor_interval = 0  # its thread would undo miniters
    options = {"leave": False, "miniters": batch, "smoothing": 0}
    if not sys.stderr.isatty():
        options |= {"delay": 60, "mininterval": 60,
                    "bar_format": "  {desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} to go\n"}
    return tqdm(total=total, desc=what, disable=rank() != 0, dynamic_ncols=True, **options)


# 4. Problems and prompts ----------------------------------------------------------------------------------------------

SETS = {  # name/split: its file in the DATA folder, and where the Hub has it: owner/name:configuration@split
    "gsm8k/train": "gsm8k/train.jsonl openai/gsm8k:main@train",
    "gsm8k/test": "gsm8k/test.jsonl openai/gsm8k:main@test",
    "math/train": "math/train.jsonl DigitalLearningGmbH/MATH-lighteval@train",
    "math/test": "math/test.jsonl DigitalLearningGmbH/MATH-lighteval@test",
    "math500/test": "math500/test.jsonl HuggingFaceH4/MATH-500@test",
    "aime24/test": "aime24/test.jsonl HuggingFaceH4/aime_2024@train",
    "aime25/test": "aime25/test.jsonl math-ai/aime25@test",
    "aime_1983_2023/train": "aime_1983_2023/train.jsonl",
    "amc23/test": "amc23/test.jsonl math-ai/amc23@test",
    "olympiadbench/test": "olympiadbench/test.jsonl Hothan/OlympiadBench:OE_TO_maths_en_COMP@train",
    "minerva_math/test": "minerva_math/test.jsonl math-ai/minervamath@test",
    "college_math/test": "college_math/test.jsonl di-zhang-fdu/College_Math_Test@test",
    "gaokao2023en/test": "gaokao2023en/test.jsonl MARIO-Math-Reasoning/Gaokao2023-Math-En@train",
    "theoremqa/test": "theoremqa/test.jsonl TIGER-Lab/TheoremQA@test",
    "tal_scq/train": "tal_scq5k/en_train.jsonl",
    "tal_scq/test": "tal_scq5k/en_test.jsonl",
    "svamp/train": "svamp/train.jsonl ChilleD/SVAMP@train",
    "svamp/test": "svamp/test.jsonl ChilleD/SVAMP@test",
    "adastar_svamp/train": "adastar_svamp/train.jsonl",
    "adastar_svamp/test": "adastar_svamp/test.jsonl",
    "adastar_gsm8k/test": "adastar_gsm8k/test.jsonl",
    "arc_challenge/train": "arc_challenge/train.jsonl allenai/ai2_arc:ARC-Challenge@train",
    "arc_challenge/test": "arc_challenge/test.jsonl allenai/ai2_arc:ARC-Challenge@test",
    "commonsenseqa/train": "commonsenseqa/train_rand_split.jsonl tau/commonsense_qa@train",
    "commonsenseqa/test": "commonsenseqa/dev_rand_split.jsonl tau/commonsense_qa@validation",
    "anli_r1/train": "anli_r1/train_r1.jsonl facebook/anli@train_r1",
    "anli_r1/test": "anli_r1/test_r1.jsonl facebook/anli@test_r1",
    "adastar_arc/train": "arc_challenge/train_val_combined.jsonl",
    "adastar_arc/test": "arc_challenge/test_new.jsonl",
    "cladder/train": "cladder/cladder_train.jsonl",
    "cladder/test": "cladder/cladder_test.jsonl causal-nlp/CLadder@full_v1.5_default",
}
ON_THE_HUB = r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w.-]+))?"  # owner/name:configuration@split
FIELDS = {  # names of a problem's parts in the sets, in any case; the first one present and not null counts
    "problem": ("problem", "question", "stem", "prompt"),
    "answer": ("answer", "expected_answer", "final_answer", "ground_truth", "target", "answerkey", "answer_value",
               "label"),
    "solution": ("solution", "reference_solution", "reasoning", "answer_analysis"),
    "level": ("level", "difficulty"),
    "tags": ("tags", "subject", "type", "subfield", "data_topic", "knowledge_point_routes", "query_type"),
    "choices": ("choices", "options", "answer_option_list"),
}
UNREAD = "option|choice|alternative|context|passage|^[a-f]$"  # other fields that a problem may be incomplete without
PLAIN = {"math": "(?s).+", "choice": r"\(?[A-Za-z]\)?", "yesno": "(?i)yes|no|true|false"}  # answers without choices
ENTAILMENT = ("entailment", "neutral", "contradiction")  # names of the labels 0, 1, 2
PLACEHOLDER = (r"(?i:[\s?.–—_*/-]*|n/?a\.?|none|null|nil|nan|-?inf|tbd|todo|unknown|missing|proof|"
               r"(?:not|no)[ _-]?(?:found|available|applicable|provided|given|answer))")
ONE_OF_SEVERAL = rf"(?!{PLACEHOLDER}$)(?=.*[\d\\]|\w$)(?:[^,]+|[(\[{{].+)"  # for a list's parts: no word, no comma
# In a record's JSON: a lone surrogate, control characters, or LaTeX with one backslash, as in \frac, \right, \times
DAMAGED = (r"[\ud800-\udfff\ufffd\x7f]|(?<!\\)(?:\\\\)*\\(?:[bf]|r(?!\\n)|u00|t(?:imes|ext|heta|frac|an|o|au|ilde)\b|"
           r"n(?:(?:eq|abla|ot|otin|leq|geq)\b|e [-\d\\]|u\$))")


def load_problems(names, split, folder, limit=0):
    """Load the problems of sets ("gsm8k,math", "my/file.jsonl"): a fixed random `limit` of each (0: all), in order.

    A name in SETS is read from `folder` if its file is there, else from the Hub; "owner/name:configuration@split" is a
    set on the Hub. `read_problem` describes a record. An unusable record in your own file ends the program with file,
    line and reason; in a public set, which you cannot edit, it is dropped, counted and reported."""
    problems = []
    notes = defaultdict(list)  # {note to print: where it applies}
    for name in filter(None, names.split(",")):
        found = _read_set(name, split, folder, notes)
        chosen = np.random.default_rng(0).permutation(len(found))[:limit or None]
        problems += [found[i] for i in sorted(chosen)]
    if not problems:
        fail(f"no problem set is named ({names!r})")
    for i, same in by_problem(problems).items():
        if len(same) > 1:
            fail(f"two problems have the id {i!r}; rename one of the files or folders")
    first = {}
    checker = Checker(1)
    for problem in problems:
        earlier = first.setdefault(problem["problem"], problem)
        if earlier is not problem:
            notes["problems kept although they repeat the text of an earlier one"].append(problem["id"])
        if earlier["answer"] != problem["answer"]:
            notes["of these, with a different answer from the earlier one"].append(problem["id"])
        box = last_boxed(problem.get("solution", ""))
        if box and box != problem["answer"]:
            _, reason = checker.submit(problem, f"\\boxed{{{box}}}").result()
            if reason in ("different", "no_answer"):  # training would teach a wrong answer
                del problem["solution"]
                notes["solutions dropped because their box is not the answer"].append(problem["id"])
    for note, where in notes.items():
        say(f"  {note}: {len(where):,} (the first: {where[0]})")
    return problems


def load_solved(names, folder):
    """Load the problems with solutions from the train splits of sets, like load_problems; [] if no set is named."""
    if not names:
        return []
    solved = [p for p in load_problems(names, "train", folder) if "solution" in p]
    if not solved:
        fail(f"{names}: no problem in it has a solution")
    return solved


@contextlib.contextmanager
def failing_as(what):
    """End the program on any exception with one line, `what` and the reason: for libraries that read foreign files."""
    try:
        yield
    except Exception as error:
        fail(f"{what}: {lines_of(error)[0]}")


def _read_set(name, split, folder, notes):
    path = Path(name)
    hub = name
    public = f"{name}/{split}" in SETS
    if public:
        file, _, hub = SETS[f"{name}/{split}"].partition(" ")
        path = Path(folder) / file
    where = path
    ids = f"{path.resolve().parent.name}/{path.stem}"
    if not path.is_file():
        if hub.endswith((".jsonl", ".json", ".parquet")) or not re.fullmatch(ON_THE_HUB, hub):
            known = [name for name in SETS if name.endswith(split)]
            fail(f"{path}: no such file; name a file, a set of --data {folder!r} or the Hub ({', '.join(known)}), or "
                 "owner/name:configuration@split on the Hub")
        public = True
        where = hub if "@" in hub else f"{hub}@{split}"
        ids = re.sub("[:@]", "/", where)
    with failing_as(f"{where} cannot be read (supported: .jsonl, .json and, with the packages pyarrow and "
                    f"datasets, .parquet and the Hub; sets are looked up in --data {folder!r})"):
        records = _records_of(where)
    problems = []
    for number, record in enumerate(records, 1):
        if record == "":  # a blank line
            continue
        try:
            problem = read_problem(json.loads(record) if isinstance(record, str) else record)
        except Exception as error:  # JSON of any form
            if not public:
                fail(f"{where}:{number}: {lines_of(error)[0]}; fix or remove it (each line is one problem in JSON)")
            notes[f"{where}: records dropped because they cannot be used"].append(f"{number}, {error}")
            continue
        if problem:
            problems.append({"id": f"{ids}/{number}", **problem})
        else:
            notes[f"{where}: problems dropped without an answer (in 'answer' or in a box of 'solution')"].append(number)
    if not problems:
        fail(f"{where}: no problem with an answer in it")
    return problems


def _records_of(where):
    """Return the records of a .parquet or .json file or of a set on the Hub, or the lines of a .jsonl file."""
    if isinstance(where, str):
        from datasets import load_dataset
        repository, configuration, split = re.fullmatch(ON_THE_HUB, where).groups()
        return load_dataset(repository, configuration, split=split)
    if where.suffix == ".parquet":
        from pyarrow import parquet
        return parquet.read_table(where).to_pylist()
    text = where.read_text(encoding="utf-8-sig", errors="surrogateescape")  # `read_problem` rejects what is not UTF-8
    if where.suffix == ".jsonl":
        return [line.strip() for line in text.split("\n")]
    records = json.loads(text)
    if not isinstance(records, list):
        raise ValueError("it is not a list of problems")
    return records


def read_problem(record):
    """Convert a source record to a problem without its id; None if it has no answer; ValueError if it cannot be used.

    FIELDS lists the names to look for. An answer may be a number, a list (all of it must be given, in any order),
    follow "####" (GSM8K) or, if there is none, be in the last box of the solution (MATH). With `choices`, the problem
    ends with lettered options and the answer is a letter. `kind` may be given; otherwise the answer determines it."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    record = {name.lower(): value for name, value in record.items() if value is not None}
    if isinstance(record.get("question"), dict):  # CommonsenseQA
        record |= record.pop("question")
    for name, value in record.items():
        if value and name not in FIELDS["choices"] and re.search(UNREAD, name):
            raise ValueError(f"{name!r} is not read; put text in 'problem' and options as a list in 'choices'")
    if len({str(record[name]) for name in FIELDS["answer"] if name in record}) > 1:
        raise ValueError("two fields have different answers")
    text, answer, solution, level, tags, choices = [_first(record, names) for names in FIELDS.values()]
    kind = record.get("kind")
    if "body" in record:  # SVAMP
        text = f"{record['body']} {text}"
    elif "premise" in record:  # ANLI
        text = (f"Premise: {record['premise']}\nHypothesis: {record['hypothesis']}\nDoes the premise entail the "
                "hypothesis? Answer entailment, neutral or contradiction.")
        answer = dict(enumerate(ENTAILMENT)).get(answer, answer)
        kind = "label"
        choices = ENTAILMENT
    damaged = re.search(DAMAGED, json.dumps([text, answer, solution, tags, choices], ensure_ascii=False, default=str))
    if damaged:
        raise ValueError(f"not UTF-8, a control character, or LaTeX with one backslash (JSON has two): {damaged[0]!r}")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no text under 'problem' or 'question'")
    if str(record.get("answer_type")).startswith("list"):  # TheoremQA: numbers, in this order
        answer = str(answer)
    answer, solution = _answer_and_solution(answer, solution)
    if not answer or not choices and re.fullmatch(PLACEHOLDER, re.sub(r"\\text|[][(){}$\"']", "", answer)):
        return None

    if not kind:
        kind = "math"
        if re.fullmatch(r"\([A-Za-z]\)", answer):
            kind = "choice"
        elif re.fullmatch(PLAIN["yesno"], answer):
            kind = "yesno"
    problem = {"problem": text.strip().replace("\r\n", "\n"), "answer": answer, "kind": kind}
    if choices:
        _add_choices(problem, choices)
    elif not re.fullmatch(PLAIN.get(kind, ""), answer):
        raise ValueError(f"'kind' is {kind!r}; it must be math, choice or yesno, and the answer must match it")
    if solution:
        if not last_boxed(solution):
            solution += f"\n\n\\boxed{{{problem['answer']}}}"  # so that training teaches to state the answer
        problem["solution"] = solution
    whole = re.fullmatch(r"(?i)(?:level )?(\d+)(?:\.0+)?", str(level))
    if whole:
        problem["level"] = int(whole[1])
    if tags:
        problem["tags"] = [str(tag) for tag in tags] if isinstance(tags, list) else [str(tags)]
    return problem


def _first(record, names):
    """Return the value under the first of the names that the record has, or None."""
    return next((record[name] for name in names if name in record), None)


def _answer_and_solution(answer, solution):
    """Return the answer as text or None, and the solution as text, with a "####" answer put into a box.

    GSM8K has both in the answer: one step per line with <<calculator notes>>, the last with the answer after "####"."""
    if isinstance(answer, str) and re.search(r"####|\\boxed", answer) and not solution:
        solution = answer
        answer = None
    if isinstance(solution, list):
        solution = "\n\n".join(solution)
    if not isinstance(solution, str | None):
        raise ValueError("'solution' is neither a text nor a list of texts")
    solution = (solution or "").strip().replace("\r\n", "\n")
    if re.search(r"####.*\Z", solution):  # not a heading
        solution = re.sub("\n+", "\n\n", re.sub("<<.*?>>", "", solution))
        solution = re.sub(r"#### *(.*)\Z", r"\\boxed{\1}", solution)
    stated = last_boxed(solution)
    if re.fullmatch(PLACEHOLDER, solution) or solution == f"\\boxed{{{stated}}}":
        solution = ""
    if answer is None:
        return stated, solution
    answer = _text_of(answer)
    if re.search(r"<<|####|\\boxed|^\[\s*['\"]", answer):
        raise ValueError(f"the answer {answer[:60]!r} is a list as text or includes its steps; give the value alone")
    return answer, solution


def _text_of(answer):
    """Return an answer as text: numbers in full, the parts of a list separated by commas."""
    if isinstance(answer, float):
        return np.format_float_positional(answer + 0.0, trim="-")  # + 0.0 turns -0.0 into 0
    if isinstance(answer, str | int):
        return str(answer).strip()
    if not isinstance(answer, list):
        raise ValueError(f"{str(answer)[:60]!r} is neither a text, a number nor a list of these")
    parts = [_text_of(part) for part in answer]
    values = set()
    for part in parts:
        value = rewritten(part)
        with contextlib.suppress(ValueError):
            value = Fraction(value)
        if len(parts) > 1 and (value in values or not re.fullmatch(ONE_OF_SEVERAL, part)):
            raise ValueError(f"the answers {parts} are not distinct, or one is not a bare value")
        values.add(value)
    return ", ".join(parts)


def _add_choices(problem, choices):
    """Append a problem's options to its text, lettered from A, and make its answer name one of them."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    labels = ()
    texts = choices
    if isinstance(choices, dict):
        labels = choices.get("label", choices)  # {"label": [...], "text": [...]} in ARC; or {"A": "a cat", ...}
        texts = choices.get("text", choices.values())
    elif isinstance(choices[0], dict):  # CommonsenseQA
        labels, texts = zip(*[option.values() for option in choices])
    elif isinstance(choices[0], list):  # TAL-SCQ
        labels, texts = zip(*[option.values() for [option] in choices])
    labels = [str(label).upper() for label in labels]
    order = "".join(labels) or letters[:len(texts)]
    if len(order) != len(texts) or not letters.startswith(order) and not "123456789".startswith(order):
        raise ValueError("'choices' must be at most 26 texts, without labels or with A, B, ... or 1, 2, ...")
    texts = [_text_of(text) for text in texts]
    bare = [re.sub(rf"^\(?{letter}[.):]\)?\s*", "", text) for letter, text in zip(letters, texts)]  # "A. a cat"
    if not {*bare} & {*texts}:
        texts = bare
    answer = problem["answer"]
    label = answer.strip("(). ").upper()
    if label in labels:
        letter = letters[labels.index(label)]
    else:
        letter = letter_of(answer, texts)
        same = [letter for letter, text in zip(letters, texts) if text == answer]
        number = answer.isdecimal() and int(answer) <= len(texts)  # may count from 0, from 1, or be a text
        if not letter or number or same not in ([], [letter]):
            raise ValueError(f"the answer {answer!r} is none of the choices or could be several; give its letter")
    problem["choices"] = texts
    if problem["kind"] == "label":
        problem["answer"] = texts[letters.index(letter)]
        return
    problem["kind"] = "choice"
    problem["answer"] = letter
    for letter, text in zip(letters, texts):
        problem["problem"] += f"\n({letter}) {text}"


def load_network(kind, folder, **options):
    """Load the model in a folder with transformers. End the program if a tensor is missing or has a different shape,
    because it would silently be random."""
    with failing_as(folder):
        network, about = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True,
                                              ignore_mismatched_sizes=True, **options)
    for name, found, wanted in about["mismatched_keys"]:
        fail(f"{folder}: {name} has the shape {tuple(found)}, but config.json says {tuple(wanted)}")
    lost = sorted(name for name in about["missing_keys"] if "pooler." not in name)  # nothing here uses the pooler
    if lost:
        fail(f"{folder}: {len(lost)} missing tensors, first {lost[0]}")
    return network


@functools.cache  # files on the Hub may change; a process keeps the version it started with
def local_folder(model):
    """Return the folder of a model: the given one, or the local copy of the files on the Hub, downloaded if needed."""
    if Path(model).is_dir():
        return str(model)
    with failing_as(f"{model}: no such folder here, and it cannot be downloaded from the Hub"):
        return snapshot_download(model, allow_patterns=["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"])


def weight_files(model):
    """List a model's safetensors files, from its index if it has one, because a folder may hold the weights twice."""
    folder = Path(local_folder(model))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(read(index)["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def load_tokenizer(model, prompt, system="", think=""):
    """Load a model's tokenizer. End the program if files are missing or it cannot make prompts of this form."""
    folder = local_folder(model)
    with failing_as(model):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # code in a model's folder is never run
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer.tokenize("1 + 1"):
            raise ValueError("there is no tokenizer in it")
        size = max(tokenizer.get_vocab().values()) + 1
        room = config.get_text_config().vocab_size
        if size > room:
            raise ValueError(f"its tokenizer has {size:,} tokens, but the model only {room:,}")
        if prompt and not tokenizer.eos_token:
            raise ValueError("its tokenizer has no end token (eos_token in tokenizer_config.json)")
        if prompt == "chat":
            if not tokenizer.chat_template:
                raise ValueError("it has no chat template; use --prompt few_shot or zero_shot")
            end_token(tokenizer, prompt)
            if think and "enable_thinking" not in str(tokenizer.chat_template):
                say(f"{model}: its chat template does not know --think, so it has no effect")
            example = {"problem": "2 + 2 = ?", "solution": "4"}
            if "1 + 1 = ?" not in make_prompt(tokenizer, prompt, {"problem": "1 + 1 = ?"}, [example], system, think):
                raise ValueError("its chat template does not show the last turn; use --prompt few_shot or zero_shot")
    return tokenizer


def context_of(model):
    """Return how many tokens a model can take."""
    return AutoConfig.from_pretrained(local_folder(model)).get_text_config().max_position_embeddings


def check_length(problem, ids, new, context):
    """End the program if a prompt's token ids and `new` more do not fit into the context."""
    if len(ids) + new > context:
        fail(f"the prompt of {problem['id']} has {len(ids):,} tokens; with {new} new ones it exceeds the context of "
             f"{context:,}; reduce either (--max-new-tokens, --shots)")


def make_prompt(tokenizer, prompt, problem, examples=(), system="", think=""):
    """Return the text to continue: plain, after `examples` ("few_shot", "zero_shot"), or the turns of a "chat"."""
    if prompt != "chat":
        shots = [f"Question: {e['problem']}\nAnswer:\n{e['solution']}\n\n" for e in examples]
        return f"{''.join(shots)}Question: {problem['problem']}\nAnswer:\n"
    turns = []
    if system:
        turns.append({"role": "system", "content": system})
    for example in examples:
        turns.append({"role": "user", "content": example["problem"]})
        turns.append({"role": "assistant", "content": example["solution"]})
    turns.append({"role": "user", "content": problem["problem"]})
    return chat_text(tokenizer, turns, think, add_generation_prompt=True)


def chat_text(tokenizer, turns, think="", **options):
    """Format the turns of a conversation with the model's chat template; ValueError if the template cannot.

    think: "on" or "off" for a template that knows enable_thinking, else ""."""
    if think:
        options["enable_thinking"] = think == "on"
    today = datetime(2024, 7, 26)  # Llama 3's default without a clock, so that prompts do not depend on the date
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, strftime_now=today.strftime, **options)
    except Exception as error:  # a template is a program, though a sandboxed one
        raise ValueError(f"its chat template fails: {lines_of(error)[-1]} (--system '' omits the system turn)")


def end_token(tokenizer, prompt):
    """Return the token that ends an answer: for "chat" the one the template puts after a turn, else end of text."""
    if prompt != "chat":
        return tokenizer.eos_token
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!!"}]
    behind = chat_text(tokenizer, turns).rpartition("!!")[2].strip()
    for token in tokenizer.tokenize(behind):
        if token in tokenizer.get_added_vocab():  # special or not
            return token
    if behind:
        raise ValueError(f"its chat template ends an answer with {behind[:50]!r}, which is not an added token")
    return tokenizer.eos_token


def end_ids(tokenizer, folder):
    """Return the ids of all tokens that end an answer, because a tuned model may use any of them."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        with contextlib.suppress(ValueError):  # an unused template that expects different turns
            ends.add(tokenizer.convert_tokens_to_ids(end_token(tokenizer, "chat")))
    path = Path(folder) / "generation_config.json"
    named = read(path).get("eos_token_id") if path.exists() else None
    ends.update(named if isinstance(named, list) else [named])
    return sorted(ends - {None})


def make_example(tokenizer, prompt, problem, *answers, system="", think=""):
    """Make a training example: the problem's zero-shot prompt, and what to learn from it, as texts or responses."""
    completions = []
    ids = []
    for answer in answers:
        if isinstance(answer, str):
            answer = {"text": answer}
        completions.append(answer["text"])
        ids.append(answer.get("ids"))
    return {"id": problem["id"], "prompt": make_prompt(tokenizer, prompt, problem, (), system, think),
            "completions": completions, "ids": ids, "end": end_token(tokenizer, prompt)}


@functools.lru_cache(256)  # draws of a problem share its prompt
def encode(tokenizer, text):
    """Return a prompt's token ids: with the start tokens that the tokenizer adds, unless the text (a chat) has its own,
    and without the end tokens that it adds."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer("1")["input_ids"]
    bare = tokenizer("1", add_special_tokens=False)["input_ids"]
    start = whole[:whole.index(bare[0])]
    if ids[:len(start)] == start:
        return ids
    return start + ids


# 5. Sampling: requests in, checked responses out ----------------------------------------------------------------------

GROUP = 64  # requests that transformers answers as one batch, on whichever process; affects the results
IN_FLIGHT = 2048  # requests in a vLLM engine, waiting ones included; enough that it never runs dry
STOP = "\n\nQuestion:"  # where a base model that was shown examples starts to invent the next one
Request = namedtuple("Request", "problem draw ids seed known")  # known: answered before the program was killed


@phase
def sample(run, file, model, problems, draws, prompt, enough=None, grade=None, *, style, max_new_tokens, **sampling):
    """Draw answers with a model and check them. Return the responses in the order of problems, then of draws.

    draws: number per problem (an int, or a list parallel to problems). prompt(problem, draw): the text to continue.
    enough(responses): whether a problem's first responses are enough; more must then be enough too. Draws then come in
    waves (1, 1, 2, 4, ...), and those after the first that are enough are dropped, but counted as spent.
    grade(problem, answer) -> (correct, reason) replaces the checker. style: the form of the prompts. sampling:
    temperature (0 is greedy), top_p, top_k. Requests do not depend on the number of processes."""
    began = time.time()
    round, phase = round_and_phase(file)
    engine = run.engine
    loading = engine.use(local_folder(model), style, max_new_tokens, sampling)
    path = run.unfinished / f"{file.replace('/', '-').removesuffix('.jsonl')}@{rank()}.jsonl"
    known = begin_draws(path, problems, draws, enough)
    own = list(known.values())  # transformers' batches affect the results, so all processes track all problems
    if engine.streams:
        own = own[rank()::world_size()]
    queue = deque()  # (problem, draw) to request
    pending = deque()  # (answer, its verdict), which may not be ready yet
    mine = []  # answers that the other processes do not know yet

    def requests():
        while queue:
            problem, draw = queue.popleft()
            ids = encode(engine.tokenizer, prompt(problem, draw))
            check_length(problem, ids, max_new_tokens, engine.room)
            seed = seed_of(run.seed, round, phase, problem["id"], draw)
            yield Request(problem, draw, ids, seed, draw in known[problem["id"]].answers)

    def record_verdicts(wait):
        while pending and (wait or pending[0][1].done()):
            answer, verdict = pending.popleft()
            answer["correct"], answer["reason"] = verdict.result()
            write_line(lines, answer)
            mine.append(answer)
            take_in(known, [answer])
            if engine.streams:
                queue.extend(known[answer["id"]].next_wave())
            shown.update(world_size())  # the other processes are about as far

    total = sum(of_problem.limit for of_problem in known.values())
    with open(path, "a") as lines, bar(total, f"round {round} {phase}", GROUP) as shown:
        while True:
            for of_problem in own:
                queue.extend(of_problem.next_wave())
            if not queue:
                break
            for request, answer in engine.answers(requests):
                problem = request.problem
                answer = {"id": problem["id"], "draw": request.draw, **answer, "prompt_tokens": len(request.ids)}
                verdict = (given(grade(problem, answer)) if grade else
                           run.checker.submit(problem, answer["text"], answer["finish"]))
                pending.append((answer, verdict))
                record_verdicts(wait=False)
            record_verdicts(wait=True)
            if not engine.streams:
                share(known, mine)
    share(known, mine)
    return end_draws(run, round, phase, known, loading, time.time() - began)


class Draws:
    """The draws of one problem in a phase: how many were requested, which were answered, and which count."""

    def __init__(self, problem, limit, enough):
        self.problem = problem
        self.limit = limit
        self.enough = enough
        self.asked = 0
        self.answers = {}  # {draw: answer}

    def next_wave(self):
        """Return [(problem, draw)] to request next; [] if the last wave is incomplete or was enough."""
        start = self.asked
        first = [self.answers.get(draw) for draw in range(start)]
        if None in first or self.enough and first and self.enough(first):
            return []
        self.asked = self.limit
        if self.enough:
            self.asked = min(self.limit, max(1, 2 * start))
        return [(self.problem, draw) for draw in range(start, self.asked)]

    def counted(self):
        """Return the responses that count: up to the first that are enough."""
        first = []
        for draw in range(self.limit):
            first.append(self.answers[draw])
            if self.enough and self.enough(first):
                break
        return first


def begin_draws(path, problems, draws, enough):
    """Return {problem id: its Draws}, with answers left next to `path` by earlier starts on any number of processes."""
    if isinstance(draws, int):
        draws = [draws] * len(problems)
    known = {problem["id"]: Draws(problem, limit, enough) for problem, limit in zip(problems, draws)}
    take_in(known, torn_lines(path.parent, f"{path.name.rpartition('@')[0]}@*"))
    barrier()  # all processes have read before any of them writes
    path.parent.mkdir(parents=True, exist_ok=True)
    return known


def take_in(known, answers):
    """Add answers to `known`, {problem id: its Draws}; existing ones stay."""
    for answer in answers:
        known[answer["id"]].answers.setdefault(answer["draw"], answer)


def share(known, mine):
    """Share this process's new answers with all processes; empty `mine`."""
    for answers in gather(mine):
        take_in(known, answers)
    mine.clear()


def end_draws(run, round, phase, known, loading, seconds):
    """Return the responses that count. Log and print statistics of these and the cost of all draws."""
    counted = []
    drawn = []
    for of_problem in known.values():
        counted += of_problem.counted()
        drawn += of_problem.answers.values()
    parameters = run.engine.parameters
    costs = costs_of(counted, parameters)
    spent = costs_of(drawn, parameters)
    for name in ("draws", "tokens", "prompt_tokens", "flops"):
        costs[f"spent_{name}"] = spent[name]
    run.log(round, phase, **costs, **loading, parameters=parameters, seconds=seconds)
    answers = max(1, costs["draws"])
    cut = costs["verdicts"]["cut"] / answers
    silent = costs["verdicts"]["no_answer"] / answers
    say(f"  round {round}  {phase:<10}{costs['draws']:>7,} answers of {spent['draws']:,} drawn, "
        f"{costs['correct'] / answers:.1%} correct, {cut:.0%} cut, {silent:.0%} state no answer, "
        f"{spent['tokens'] / seconds:,.0f} tok/s, {seconds:.1f} s")
    if cut > 0.5:
        say("           more than half were cut: raise --max-new-tokens")
    if silent > 0.5:
        say("           more than half state no answer: read some, then try a different --prompt, --system or --grader")
    failed = {reason: n for reason, n in costs["verdicts"].items() if reason in NO_VERDICT and reason != "cut"}
    if failed:
        say(f"           wrong without a comparison: {text_of(failed)}")
    return counted


def costs_of(answers, parameters):
    """Return counts of answers, and FLOPs (2 N per token)."""
    tokens = sum(a["tokens"] for a in answers)
    prompt_tokens = sum(a["prompt_tokens"] for a in answers)
    return {"draws": len(answers), "correct": sum(a["correct"] for a in answers), "tokens": tokens,
            "prompt_tokens": prompt_tokens, "cut": sum(a["finish"] == "length" for a in answers),
            "verdicts": Counter(a["reason"] for a in answers), "flops": 2 * parameters * (prompt_tokens + tokens)}


class TransformersEngine:
    """Answer requests with transformers' generate, in batches of GROUP that do not depend on the number of processes,
    because in a different batch, a row's logits differ by 1e-6, which may flip a token. One CPU thread per batch."""

    streams = False  # whether requests can be added while others are answered
    folder = None  # of the loaded model

    def __init__(self, run):
        self.run = run

    def use(self, folder, style, max_new_tokens, sampling):
        """Switch to this model and these settings; return the seconds it took, for the metrics."""
        self.stop = None if style == "chat" else STOP
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        if folder == self.folder:
            return {}
        began = time.time()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.ends = end_ids(self.tokenizer, folder)
        self.room = context_of(folder)
        self.parameters = count_parameters(folder)
        give_memory_back()  # from training
        costs = self.load(folder)
        self.folder = folder
        return costs | {"load_seconds": time.time() - began}

    def fits(self, text):
        """Return whether a prompt and an answer fit into the context."""
        return len(encode(self.tokenizer, text)) + self.max_new_tokens <= self.room

    def load(self, folder):
        """Load a model; return numbers for the metrics."""
        self.model = load_network(AutoModelForCausalLM, folder, dtype=compute_dtype()).to(device()).eval()
        for name, tensor in self.model.named_parameters():
            if not tensor.isfinite().all():  # else every answer would silently be wrong
                fail(f"{folder}: {name} has values that are not finite")
        self.model.generation_config = GenerationConfig()  # a folder's own may set a repetition penalty and the like
        return {}

    def sleep(self):
        """Free the model's memory to make room for training; return numbers for the metrics."""
        self.folder = None
        self.model = None
        give_memory_back()
        return {}

    def answers(self, requests):
        """Yield (request, {text, ids, tokens, finish}) for requests(). On a CPU, each core answers its own batch."""
        ordered = sorted(requests(), key=lambda request: len(request.ids))  # little padding
        groups = [ordered[at:at + GROUP] for at in range(0, len(ordered), GROUP)]
        own = []
        for group in groups[::-1][rank()::world_size()]:  # the longest first
            if not all(request.known for request in group):
                own.append(group)
        cores = 1 if device().type == "cuda" else threads_per_process()
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for group, answers in zip(own, pool.map(self.generate, own)):
                yield from zip(group, answers)

    def generate(self, group):
        """Return the answers to a group of requests, seeded by the first."""
        shared, cache = self.read_prefix([request.ids for request in group])
        prompts = [request.ids[len(shared):] for request in group]
        batch = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(device())
        before = torch.tensor([shared] * len(group), dtype=torch.long, device=device())
        batch["input_ids"] = torch.cat([before, batch["input_ids"]], 1)
        batch["attention_mask"] = torch.cat([torch.ones_like(before), batch["attention_mask"]], 1)
        noise = []
        if self.sampling["temperature"] > 0:
            noise = [noise_of(group[0].seed, **self.sampling)]
        out = self.model.generate(**batch, past_key_values=cache, max_new_tokens=self.max_new_tokens,
                                  stop_strings=self.stop, tokenizer=self.tokenizer, eos_token_id=self.ends,
                                  logits_processor=noise, pad_token_id=self.tokenizer.pad_token_id)
        return [self.answer(row) for row in out[:, batch["input_ids"].shape[1]:].tolist()]

    @torch.no_grad()
    def read_prefix(self, prompts):
        """Run what all prompts start with (worked examples) once; return (its ids, a cache of it for each prompt).

        Padding follows it, which only plain attention can mask; for models with other layers return ([], None)."""
        cache = DynamicCache(config=self.model.config)
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            return [], None
        shared = []
        for column in zip(min(prompts, key=len)[:-1], *prompts):  # leave one token to predict from
            if len(set(column)) > 1:
                break
            shared.append(column[0])
        if shared:
            self.model.get_decoder()(torch.tensor([shared], device=device()), past_key_values=cache)
            cache.batch_repeat_interleave(len(prompts))
        return shared, cache

    def answer(self, row):
        """Make the record of an answer from its tokens, which may continue past its end. Drop the ids of a stop string;
        if no token ends right before it, record no ids."""
        ids = list(itertools.takewhile(lambda token: token not in self.ends, row))
        tokens = len(ids)
        text = self.decode(ids)
        finish = "stop"
        if self.stop and self.stop in text:
            text = text.partition(self.stop)[0]
            while len(self.decode(ids)) > len(text):
                ids.pop()
        elif tokens < len(row):
            tokens += 1  # the end token
        else:
            finish = "length"
        known = " ".join(map(str, ids)) if self.decode(ids) == text else None
        return {"text": text.strip(), "ids": known, "tokens": tokens, "finish": finish}

    def decode(self, ids):
        """Return the text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def noise_of(seed, temperature, top_k=0, top_p=1.0):
    """Return a logits processor (rows, V) whose argmax is a random draw: it divides the probabilities at a temperature,
    cut by top_k (0: off) and top_p, by exponentially distributed noise, as torch.multinomial does. It has its own
    generator, so that groups can be generated in parallel."""
    generator = torch.Generator(device()).manual_seed(seed)
    steps = [TemperatureLogitsWarper(temperature)]
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))

    def add_noise(ids, logits):
        for step in steps:
            logits = step(ids, logits)
        return logits.softmax(1) / torch.empty_like(logits).exponential_(generator=generator)

    return add_noise


class VllmEngine(TransformersEngine):
    """Answer requests with vLLM: one engine per process, built once. It sleeps while the GPU trains, takes new weights
    without a restart, and after each change must pass a self-test that shows it has them."""

    streams = True
    llm = None

    def load(self, folder):
        if self.llm is None:
            self.build(folder)
        else:
            self.send_weights(folder)
        self.room = self.llm.llm_engine.model_config.max_model_len
        return self.self_test(folder)

    def build(self, folder):
        """Build the engine. vLLM casts the weights as it loads them."""
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if "RANK" not in os.environ:
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        warnings.simplefilter("ignore", FutureWarning)  # from vLLM's own use of torch
        set_num_threads = torch.set_num_threads  # vLLM turns it into a no-op, but the trainer needs it
        from vllm import LLM
        from vllm.platforms import current_platform
        if device().type == "cuda":
            machine = dict(enforce_eager=self.run.constants["EAGER"], enable_sleep_mode=True, max_model_len=-1,
                           max_num_seqs=512,  # as many as its CUDA graphs cover
                           gpu_memory_utilization=self.run.constants["GPU_MEMORY"])
        elif current_platform.is_cpu():  # chunked prompts with a seed per request would break the CPU engine
            torch.compiler.set_stance("force_eager")  # saves 5-20 s in the self-test
            tokens = min(self.room, 8192)
            machine = dict(enforce_eager=True, enable_chunked_prefill=False, max_num_batched_tokens=tokens,
                           max_model_len=tokens, kv_cache_memory_bytes=2**30)
        else:
            fail("--engine vllm: there is no GPU, and the installed vLLM is not the CPU build")
        # external_launcher runs in this process, needs the process group to exist, and takes the GPU of LOCAL_RANK
        self.llm = LLM(folder, dtype=compute_dtype(), distributed_executor_backend="external_launcher",
                       generation_config="vllm", use_tqdm_on_load=False, **machine)
        self.shape = shape_of(folder)
        torch.set_num_threads = set_num_threads

    def send_weights(self, folder):
        """Load a different folder's weights into the engine, asleep or awake."""
        if shape_of(folder) != self.shape:
            fail(f"{folder}: vLLM's engine was built for a model of a different shape; score one model at a time")
        self.llm.wake_up(tags=["weights"])  # if it is asleep
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": read_weights(folder)})
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def self_test(self, folder):
        """End the program unless the engine has the weights of its folder. Compare them bit for bit where vLLM keeps
        them unchanged, and the log-probabilities of a row of tokens with the trainer's, up to rounding."""
        from vllm import SamplingParams
        compared, wrong = self.llm.apply_model(functools.partial(compare_weights, folder))[0]
        if wrong or not compared:
            fail(f"vLLM does not have the weights of {folder}: {len(wrong)} of {compared} tensors differ, {wrong[:1]}")
        path = Path(folder) / ROW
        if not path.exists():
            return {"tensors_equal": compared}
        row = read(path)
        [output] = self.llm.generate({"prompt_token_ids": row["tokens"]},
                                     SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        found = zip(row["tokens"][1:], output.prompt_logprobs[1:])
        engines = [logprobs[token].logprob for token, logprobs in found]
        error = float(np.median(np.abs(np.subtract(engines, row["logprobs"]))))
        # bfloat16: single tokens differ by 5, the median by 0.07; float32: the median by 0.00001; wrong weights: more
        limit = 0.001 if compute_dtype() == torch.float32 else 0.2
        if not error <= limit:
            fail(f"vLLM's log-probabilities of {folder} are {error:.2g} away from the trainer's (median)")
        return {"tensors_equal": compared, "logprob_error": error}

    def sleep(self):
        if self.folder is None or device().type != "cuda":
            return {}
        self.folder = None
        self.llm.sleep(2)  # frees the weights too, so the next load sends new ones
        free, total = torch.cuda.mem_get_info()
        return {"asleep_gib": (total - free) / 2**30}

    def answers(self, requests):
        """Yield (request, {text, ids, tokens, finish}) as answers finish. Call requests() again as soon as there is
        room, so that a problem's next wave need not wait for the slowest."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        torch.set_num_threads(threads_per_process())
        engine = self.llm.llm_engine
        flying = {}
        while True:
            missing = (request for request in requests() if not request.known)
            for request in itertools.islice(missing, IN_FLIGHT - len(flying)):
                settings = SamplingParams(max_tokens=self.max_new_tokens, stop=self.stop, stop_token_ids=self.ends,
                                          seed=request.seed if self.run.constants["SEEDED"] else None,
                                          output_kind=RequestOutputKind.FINAL_ONLY, **self.sampling)
                name = str(request.seed)  # unique
                engine.add_request(name, {"prompt_token_ids": request.ids}, settings)
                flying[name] = request
            if not flying:
                return
            for output in engine.step():
                if output.finished:
                    yield flying.pop(output.request_id), self.answer(output.outputs[0].token_ids)


def shape_of(folder):
    """Return the model's type and sizes, because an engine can take different weights only if these stay the same."""
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    return config.model_type, text.hidden_size, text.num_hidden_layers, text.vocab_size


def saved_tensors(model):
    """Yield (name, tensor) from a model's safetensors files; a tensor is read from disk when it is used."""
    for path in weight_files(model):
        with failing_as(model), safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def count_parameters(model):
    """Return how many numbers a model's safetensors files hold (a tied head counts once)."""
    return sum(tensor.numel() for _, tensor in saved_tensors(model))


def read_weights(folder):
    """Yield a model's tensors for vLLM, including a tied head, which is in no file, because vLLM's CPU build would
    silently keep the old one without it."""
    tied = AutoConfig.from_pretrained(folder).get_text_config().tie_word_embeddings
    for name, tensor in saved_tensors(folder):
        yield name, tensor
        if tied and name.endswith("embed_tokens.weight"):
            yield "lm_head.weight", tensor


def compare_weights(folder, model):
    """Compare vLLM's `model` with the files in `folder`; return (parameters compared, names of those that differ).

    vLLM fuses queries, keys and values into one matrix, and gate and up; embeddings may end in empty rows. Its CPU
    build packs the matrices away (they are empty), which leaves norms, biases and embeddings to compare."""
    sent = dict(read_weights(folder))
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    compared = 0
    wrong = []
    for name, parameter in model.named_parameters():
        parts = [name]
        for whole, pieces in fused.items():
            if whole in name and name not in sent:
                parts = [name.replace(whole, piece) for piece in pieces]
        if parameter.numel() and all(part in sent for part in parts):
            tensor = torch.cat([sent[part] for part in parts]).to(parameter)
            compared += 1
            if not torch.equal(parameter[:len(tensor)], tensor):  # NaN is not equal to itself either
                wrong.append(name)
    return compared, wrong


# 6. Log-probabilities -------------------------------------------------------------------------------------------------

LOGITS = 2**26  # computed at a time, 256 MiB in float32
SCALED = ("logit_scale", "logits_scaling", "final_logit_softcapping")  # set by heads that are more than one matrix


def token_logprobs(hidden, weight, targets):
    """Return log p(target) of each position in float32, (P,), from hidden (P, H) and the head's weight (V, H).

    Works in chunks of at most LOGITS logits, which are recomputed in the backward pass."""
    def chunk(h, t):
        logits = (h @ weight.T).float()
        return logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(1)

    size = LOGITS // weight.shape[0]
    parts = []
    for h, t in zip(hidden.split(size), targets.split(size)):
        parts.append(checkpoint(chunk, h, t, use_reentrant=False))
    return torch.cat(parts)


def packed_attention(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None,
                     sliding_window=None, **_):
    """Compute causal attention within each sequence of a packed row: query (1, heads, T, D) -> (1, T, heads, D).

    Without cu_seq_lens_q, each row is one sequence, padded at its end."""
    longest = max_length_q or query.shape[2]
    if sliding_window and longest > sliding_window:
        fail("this model's attention window is shorter than an example, so it cannot be trained here")
    if query.is_cuda and max_length_q:
        from torch.nn.attention.varlen import varlen_attn
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        starts = cu_seq_lens_q.int()
        out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0),
                          enable_gqa=True)
        return out[None], None
    lengths = longest
    if max_length_q:
        lengths = cu_seq_lens_q.diff().tolist()
    rows = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)):
        rows.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True))
    return torch.cat(rows, 2).transpose(1, 2), None


def sequence_logprobs(logprobs, batch):
    """Return log p(completion | prompt) of each completion of a packed batch, (S,), from those of its tokens, (P,)."""
    sums = [part.sum() for part in logprobs.split(batch["counts"])]
    return torch.stack(sums) if sums else logprobs  # a process without work has no completion and no token


class Policy(torch.nn.Module):
    """A causal language model that returns log-probabilities of a batch's targets, (P,); its head sees only these."""

    packs = True  # whether sequences laid end to end are independent

    def __init__(self, model):
        super().__init__()
        self.body = model.get_decoder()
        self.head = model.get_output_embeddings()

    def forward(self, batch):
        hidden = hidden_states(self.body, batch) if self.packs else padded_states(self.body, batch)
        return token_logprobs(hidden, self.head.weight, batch["targets"])


def hidden_states(body, batch):
    """Return the hidden states of a transformer without its head on a packed batch, at predicting positions: (P, H)."""
    return body(input_ids=batch["tokens"][None], position_ids=batch["positions"][None], use_cache=False,
                cu_seq_lens_q=batch["starts"], max_length_q=batch["longest"]).last_hidden_state[0, batch["predict"]]


def padded_states(body, batch):
    """Like hidden_states, but with one sequence per row, for models whose layers mix packed sequences. Padding comes
    after the real tokens, which do not see it."""
    lengths = batch["starts"].diff()
    rows = torch.nn.utils.rnn.pad_sequence(batch["tokens"].split(lengths.tolist()), batch_first=True)
    hidden = body(input_ids=rows, use_cache=False).last_hidden_state
    return torch.cat(torch.nn.utils.rnn.unpad_sequence(hidden, lengths, batch_first=True))[batch["predict"]]


@torch.no_grad()
def can_pack(policy):
    """Return whether log-probabilities of a sequence are independent of the sequence packed before it.

    Linear attention, state spaces and convolutions (Qwen3-Next, Falcon-H1, LFM2) leak into the next sequence. Both
    batches have the same shape and so the same rounding, so any difference is a leak."""
    first = list(range(5, 37))
    second = list(range(37, 69))
    one = policy(pack([[([], first), ([], second)]]))
    other = policy(pack([[([], first[::-1]), ([], second)]]))
    return bool((one - other)[len(first) - 1:].abs().max() < 0.01)


# 7. Packing: sequences laid end to end, no padding --------------------------------------------------------------------

def tokenize(tokenizer, example):
    """Return [(prompt ids, completion ids with the end token)] of an example."""
    prompt = encode(tokenizer, example["prompt"])
    end = tokenizer.convert_tokens_to_ids(example["end"])
    sequences = []
    for text, ids in zip(example["completions"], example["ids"]):
        if ids is None:
            completion = completion_ids(tokenizer, example["prompt"], text)
        else:
            completion = [int(token) for token in ids.split()]
        sequences.append((prompt, completion + [end]))
    return sequences


def completion_ids(tokenizer, prompt, text):
    """Return the token ids of a text that follows a prompt. Encoded alone, it may get a leading space (Llama 2)."""
    last = prompt[-1:]
    before, both, alone = tokenizer([last, last + text, text], add_special_tokens=False,
                                    split_special_tokens=True)["input_ids"]
    if both[:len(before)] == before:
        return both[len(before):]
    return alone  # the prompt's last character and the text's first form one token


def tokenize_all(tokenizer, examples, context):
    """Return {id, sequences, tokens, reference} of each example, except those longer than the context."""
    fitting = []
    for example in examples:
        sequences = tokenize(tokenizer, example)
        lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
        if max(lengths) <= context:
            fitting.append({"id": example["id"], "sequences": sequences, "tokens": sum(lengths), "reference": []})
    if not fitting:
        fail(f"all {len(examples):,} training examples are longer than the model's context of {context:,} tokens")
    if len(fitting) < len(examples):
        say(f"  {len(examples) - len(fitting):,} training examples are longer than the model's context and left out")
    return fitting


def pack(examples):
    """Pack examples, each a list of sequences, into one batch: tensors, and how many targets each sequence has.

    pack([[([1, 2], [3, 4])], [([5], [6])]]):
      tokens 1 2 3 4 5 6, positions 0 1 2 3 0 1, starts 0 4 6, predict 1 2 4, targets 3 4 6, counts 2 1
    Without examples, the batch is one token that predicts nothing, so a process without work can join the others."""
    tokens, positions, starts, predict, counts = [], [], [0], [], []
    for example in examples:
        for prompt, completion in example:
            row = prompt + completion
            first = max(1, len(prompt))  # without a prompt there is nothing to predict the first token from
            predict += range(len(tokens) + first - 1, len(tokens) + len(row) - 1)
            counts.append(len(row) - first)
            tokens += row
            positions += range(len(row))
            starts.append(len(tokens))
    if not examples:
        tokens, positions, starts = [0], [0], [0, 1]
    batch = {"tokens": tokens, "positions": positions, "starts": starts, "predict": predict}
    for name, values in batch.items():
        batch[name] = torch.tensor(values, dtype=torch.long, device=device())
    targets = batch["tokens"][batch["predict"] + 1]
    return batch | {"targets": targets, "counts": counts, "longest": max(positions) + 1}


def plan_batches(lengths, batch_size, epochs, max_tokens, processes, rng):
    """Plan the training steps: [step][micro-batch] -> example numbers. Process r takes r, r + processes, ... of a step.

    A step is `batch_size` examples over all processes (an epoch's last step may be smaller). Within a step, examples
    go, longest first, to the emptiest micro-batch. The number of micro-batches is the smallest multiple of `processes`
    that keeps each within max_tokens (a longer example is alone). This changes memory and speed, never the step."""
    steps = []
    for _ in range(epochs):
        order = rng.permutation(len(lengths)).tolist()
        for at in range(0, len(order), batch_size):
            step = sorted(order[at:at + batch_size], key=lambda e: -lengths[e])
            for count in range(processes, len(step) + processes, processes):  # up to one for each example
                micro_batches = [[] for _ in range(count)]
                loads = [0] * count
                for e in step:
                    emptiest = loads.index(min(loads))
                    micro_batches[emptiest].append(e)
                    loads[emptiest] += lengths[e]
                if all(load <= max_tokens or len(m) == 1 for m, load in zip(micro_batches, loads)):
                    break
            steps.append(micro_batches)
    return steps


# 8. Training ----------------------------------------------------------------------------------------------------------

ROW = "logprobs.json"  # in a model's folder: the trainer's log-probabilities of a row of tokens, to test the engine
ADAPTERS = "adapters/adapters.safetensors"  # in a model's folder: the adapters merged into it


@phase
def train(run, file, model, examples, loss, *, lr, warmup, epochs, batch_size, weight_decay, clip, decay=True,
          reference=False, lora_rank=0, lora_alpha=0):
    """Train a model on examples; write it in float32 to the folder `file` of the run, and steps.jsonl next to it.

    loss(logprobs, batch) -> (sum, weight, metrics) is the script's. logprobs (P,) are those of the batch's targets; the
    sum is divided by the weight of the whole step (all micro-batches, all processes), so neither the micro-batch
    nor the number of processes changes the result. With `reference`, batch["reference"] (S,) has log p(completion)
    under the initial model. AdamW; lr rises linearly over the warm-up (steps, or if below 1 their share), then stays
    constant, or with `decay` falls as a half cosine. clip: the largest gradient norm; 0 is none. lora_rank: unless 0,
    train adapters instead of all weights. Resumes a killed run."""
    began = time.time()
    round, _ = round_and_phase(file)
    figures = run.engine.sleep()
    torch.set_num_threads(threads_per_process())
    model = local_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = tokenize_all(tokenizer, examples, context_of(model))
    network, policy = load_for_training(run, model, lora_rank, lora_alpha, run.rng(round, "adapters"))
    # Before the first forward pass, after which FSDP shows whole parameters instead of the shards to be trained
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    max_tokens = run.once(f"max_tokens_{world_size()}.json", tokens_that_fit, run)
    policy.packs = can_pack(policy)
    if not policy.packs:
        say(f"  {network.config.model_type}: its layers mix packed sequences, so each is trained in a row of its own")
        max_tokens = 1
    lengths = [example["tokens"] for example in examples]
    plan = plan_batches(lengths, batch_size, epochs, max_tokens, world_size(), run.rng(round, "batches"))
    if reference:
        add_references(policy, examples, plan[:len(plan) // epochs])
    history = load_progress(run, round, policy, optimizer)
    saved = time.time()
    with bar(len(plan), f"round {round} train") as shown:
        shown.update(len(history))
        for step in range(len(history), len(plan)):
            optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(step, len(plan), warmup, decay)
            values = optimizer_step(policy, optimizer, loss, examples, plan[step][rank()::world_size()], clip)
            history.append({"step": step + 1, **values})
            if not math.isfinite(values["loss"] + values["norm"]):
                ids = [examples[e]["id"] for e in sum(plan[step], [])]
                fail(f"round {round}, training step {step + 1} of {len(plan)}: loss {values['loss']}, gradient norm "
                     f"{values['norm']}; the last good model is kept. The step's examples: {', '.join(ids)}")
            if gather(time.time() - saved >= 60 * run.constants["SAVE_MINUTES"])[0]:
                save_progress(run, round, policy, optimizer, history)
                saved = time.time()
            shown.set_description_str(f"round {round} train, loss {values['loss']:.3f}", refresh=False)
            shown.update()
    ended = time.time()
    save_model(network, tokenizer, run.folder / f"{file}.part", row_logprobs(policy, examples))
    if rank() == 0:
        write(run.folder / f"round_{round}" / "steps.jsonl", history)
    figures["save_seconds"] = time.time() - ended
    figures["seconds"] = time.time() - began
    report_training(run, round, history, lengths, epochs, reference, network, figures)


def optimizer_step(policy, optimizer, loss, examples, micro_batches, clip):
    """Run forward, backward, clip and step. Return {loss, norm, lr, seconds, ...}; loss and metrics are step means."""
    began = time.time()
    mine = Counter()
    for micro_batch in micro_batches:
        batch = pack([examples[e]["sequences"] for e in micro_batch])
        batch["reference"] = torch.tensor([examples[e]["reference"] for e in micro_batch], device=device()).flatten()
        total, weight, metrics = loss(policy(batch), batch)
        total.backward()
        mine.update({"loss": total.detach(), "weight": weight, **metrics})
    sums = Counter()
    for part in gather({name: float(value) for name, value in mine.items()}):
        sums.update(part)
    weight = sums.pop("weight")
    for parameter in policy.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(world_size() / weight)  # undo FSDP's average over processes, because this is a sum
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    values = {name: total / weight for name, total in sums.items()}
    return values | {"norm": float(whole(norm)), "lr": optimizer.param_groups[0]["lr"], "seconds": time.time() - began}


def load_for_training(run, model, lora_rank=0, lora_alpha=0, rng=None):
    """Return (the model, its Policy), sharded over all processes: float32 weights; GPUs compute in bfloat16.

    With lora_rank, the run's base is frozen, in the compute dtype, and float32 adapters are trained: those that an
    earlier round of this run saved with the model, else new ones."""
    AttentionInterface.register("packed", packed_attention)
    continued = lora_rank and Path(model).is_relative_to(run.folder)
    base = local_folder(run.constants["MODEL"]) if continued else model
    dtype = compute_dtype() if lora_rank else torch.float32
    network = load_network(AutoModelForCausalLM, base, dtype=dtype, attn_implementation="packed")
    scaled = any(getattr(network.config, name, None) for name in SCALED)
    if scaled or network.get_output_embeddings().bias is not None:
        fail(f"{model}: its head is more than one matrix, so it cannot be trained here")
    network.train()
    policy = Policy(network)
    blocks = policy.body.layers
    if lora_rank:
        network.requires_grad_(False)
        add_adapters(blocks, lora_rank, lora_alpha, rng)
    if continued:
        network.load_state_dict(load_file(Path(model) / ADAPTERS), strict=False)
    if run.constants["RECOMPUTE"]:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    if run.constants["COMPILE"]:
        for block in blocks:
            block.compile(dynamic=True)
    mixed = MixedPrecisionPolicy(param_dtype=compute_dtype(), reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh(device().type, (world_size(),))
    if world_size() > 1 or device().type == "cuda":  # a single process on a CPU would be a sixth slower, for nothing
        for module in (*blocks, policy):
            fully_shard(module, mesh=mesh, mp_policy=mixed)
    return network, policy


def whole(tensor):
    """Return a tensor gathered from its shards, if it has any; all processes take part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def add_adapters(blocks, lora_rank, lora_alpha, rng):
    """Add adapters to all linear layers of a transformer's blocks: W x becomes W x + alpha / r B A x, where A is
    (r, in) and B (out, r) (LoRA; Hu et al. 2021, eq. 3). B starts at zero, so a layer is unchanged at first."""
    for module in blocks.modules():
        if isinstance(module, torch.nn.Linear):
            bound = module.in_features ** -0.5
            a = rng.uniform(-bound, bound, (lora_rank, module.in_features))
            module.lora_A = torch.nn.Parameter(torch.tensor(a, dtype=torch.float32))
            module.lora_B = torch.nn.Parameter(torch.zeros(module.out_features, lora_rank))
            module.lora_scale = lora_alpha / lora_rank
            module.register_forward_hook(adapt)


def adapt(linear, inputs, output):
    """Forward hook: return a linear layer's output plus its adapter's."""
    return output + linear.lora_scale * (inputs[0] @ linear.lora_A.T) @ linear.lora_B.T


def compute_dtype():
    """Return the dtype in which training and transformers' sampling compute: bfloat16 on a GPU, else float32."""
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def memory_of_process():
    """Return the bytes a process may use to train: its GPU's, except 3 GiB for a sleeping vLLM (from reading), or
    its share of half the machine's (or container's)."""
    if device().type == "cuda":
        return torch.cuda.mem_get_info()[1] - 3 * 2**30
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit: "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def tokens_that_fit(run):
    """Return the tokens of a micro-batch: MAX_TOKENS, or what fits. Print an estimate of training memory; end the
    program if a GPU has too little.

    Does not depend on what is free at the moment, so a rerun gets the same. Per token, layers keep 16 H + 6 I numbers
    on a CPU (SmolLM2-135M: 1.9 MB measured, 2.2 by this formula), 11 H + 4 I on a GPU (from reading, not measured; H
    hidden, I intermediate size); with recomputation H, and all of it for one layer at a time."""
    model = local_folder(run.constants["MODEL"])
    config = AutoConfig.from_pretrained(model).get_text_config()
    hidden = config.hidden_size
    inner = config.intermediate_size
    layers = config.num_hidden_layers
    size = compute_dtype().itemsize
    tokens = run.constants["MAX_TOKENS"]
    memory = memory_of_process()
    states = 16 * count_parameters(model)  # float32, with gradient and AdamW's moments
    if run.constants["LORA_RANK"]:  # frozen; adapters of the usual rank add a tenth
        states = size * count_parameters(model)
    fixed = states / world_size() + 16 * LOGITS  # plus the loss
    numbers = 16 * hidden + 6 * inner
    if device().type == "cuda":
        numbers = 11 * hidden + 4 * inner
    a_token = size * layers * numbers
    if run.constants["RECOMPUTE"]:
        a_token = size * (layers * hidden + numbers)
    if fixed + tokens * a_token > memory:
        tokens = max(256, int((memory - fixed) / a_token))
        say(f"  memory   --max-tokens was {run.constants['MAX_TOKENS']:,}: cut to what fits")
    filled = (fixed + tokens * a_token) / 2**30
    say(f"  memory   training may fill {filled:.3g} of {memory / 2**30:.3g} GiB allowed per process, "
        f"{tokens * a_token / 2**30:.2g} of it due to --max-tokens {tokens:,}")
    if filled * 2**30 > memory and device().type == "cuda":
        fail("this model is too large to train on this GPU; use --lora-rank, --recompute, more GPUs or a smaller model")
    return tokens


def learning_rate_factor(step, steps, warmup, decay):
    """Return a factor that rises linearly to 1 over `warmup` steps (below 1: that share of all steps), then stays at 1
    or falls as a half cosine."""
    ramp = math.ceil(warmup * steps if warmup < 1 else warmup)
    if step < ramp:
        return (step + 1) / ramp
    if not decay:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))


@torch.no_grad()
def add_references(policy, examples, steps):
    """Set each example's `reference`: [log p of its first completion, of its second] under the initial policy.

    Uses the first epoch's micro-batches, so at the first step policy and reference agree exactly."""
    found = {}
    completions = len(examples[0]["sequences"])
    for step in steps:
        for micro_batch in step[rank()::world_size()]:
            batch = pack([examples[e]["sequences"] for e in micro_batch])
            sums = sequence_logprobs(policy(batch), batch)
            found.update(zip(micro_batch, sums.view(-1, completions).tolist()))
    for part in gather(found):
        for e, reference in part.items():
            examples[e]["reference"] = reference


def training_state(policy, optimizer):
    """Return {weights, moments}: trained weights and AdamW's state, as this process's shards, not copied."""
    weights, moments = get_state_dict(policy, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    if not policy.head.weight.requires_grad:
        weights.pop("head.weight", None)  # torch includes it if it is tied
    return {"weights": weights, "moments": moments}


def save_progress(run, round, policy, optimizer, history):
    """Save weights and AdamW's state in shards that load on any number of processes; then delete the previous save."""
    half = run.unfinished / f"round_{round}-step_{len(history):07d}.part"
    dcp.save(training_state(policy, optimizer), checkpoint_id=half)
    if rank() == 0:
        older = list(run.unfinished.glob(f"round_{round}-step_???????"))
        write(half / "history.json", history)
        publish(half)
        for path in older:
            shutil.rmtree(path)


def load_progress(run, round, policy, optimizer):
    """Load the last save, if there is one, into policy and optimizer; return the history of the steps so far."""
    saves = gather(sorted(run.unfinished.glob(f"round_{round}-step_???????")))[0]
    if not saves:
        return []
    dcp.load(training_state(policy, optimizer), checkpoint_id=saves[-1])  # in place, into the shards
    history = read(saves[-1] / "history.json")
    say(f"  training resumes after step {len(history):,}")
    return history


@torch.no_grad()
def row_logprobs(policy, examples):
    """Return {tokens, logprobs}: up to 256 tokens of the longest sequence, log p of all but the first by the policy."""
    rows = [prompt + completion for example in examples for prompt, completion in example["sequences"]]
    tokens = max(rows, key=len)[:256]
    return {"tokens": tokens, "logprobs": policy(pack([[([], tokens)]])).tolist()}


def save_model(network, tokenizer, folder, row):
    """Write a Hugging Face folder, and `row` to test an engine with; all processes take part, one tensor at a time.

    The weights are float32, whatever the base's dtype: half a bfloat16 step at 0.02 is 6e-5, and an update at a
    learning rate of 5e-7 would be lost. config.json names the base's dtype; loaders that use it, such as vLLM, cast."""
    weights = {}
    for name, tensor in network.state_dict().items():
        tensor = whole(tensor)
        if rank() == 0 and not (name == "lm_head.weight" and network.config.tie_word_embeddings):
            weights[name] = tensor.float().cpu()
    if rank() == 0:
        merge_adapters(network, weights, folder / ADAPTERS)
        network.save_pretrained(folder, state_dict=weights)
        network.config.dtype = AutoConfig.from_pretrained(network.config.name_or_path).dtype or torch.float32
        network.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write(folder / ROW, row)


def merge_adapters(network, weights, path):
    """Merge adapters into ordinary weights, W + alpha / r B A, and save the adapters to a file for the next round to
    continue, because after merging their small changes would be lost in a bfloat16 base."""
    adapters = {name: weights.pop(name) for name in list(weights) if ".lora_" in name}
    for name, module in network.named_modules():
        if hasattr(module, "lora_scale"):
            update = adapters[f"{name}.lora_B"] @ adapters[f"{name}.lora_A"]
            weights[f"{name}.weight"] += module.lora_scale * update
    if adapters:
        path.parent.mkdir()
        save_file(adapters, path)


def report_training(run, round, history, lengths, epochs, reference, network, figures):
    """Log and print the metrics of a training phase, including its last step's. Tokens include prompts.

    FLOPs: 6 N per token trained on (2 forward, 2 for gradients of activations, 2 for gradients of weights, if these are
    trained; Kaplan et al. 2020), 2 N per token of a reference pass."""
    tokens = sum(lengths) * epochs
    reference_tokens = sum(lengths) * reference
    flops = network.num_parameters() * (4 * tokens + 2 * reference_tokens)
    flops += network.num_parameters(only_trainable=True) * 2 * tokens
    first_loss = history[0]["loss"]
    figures = history[-1] | figures
    run.log(round, "train", first_loss=first_loss, tokens=tokens, reference_tokens=reference_tokens,
            flops=flops, spent_flops=flops, peak_gib=torch.cuda.max_memory_allocated() / 2**30, **figures)
    say(f"  round {round}  train     {len(history):>7,} steps, loss {first_loss:.3f} -> {figures['loss']:.3f}, "
        f"{tokens / figures['seconds']:,.0f} tok/s, {figures['seconds']:.1f} s")


# 9. Rounds: held-out problems, scores, answers shown, costs and tables ------------------------------------------------

def hold_out(problems, n, seed):
    """Return (the other problems, n random ones held out for scoring). The split depends on the seed and the texts,
    not on their order. Problems with the same text stay on one side, so the second list may be a little longer."""
    order = sorted(problems, key=lambda problem: seed_of(seed, "held out", problem["problem"]))
    texts = {problem["problem"] for problem in order[:n]}
    others = [problem for problem in problems if problem["problem"] not in texts]
    if not others:
        fail(f"--held-out {n} leaves nothing of the {len(problems)} problems")
    return others, [problem for problem in problems if problem["problem"] in texts]


def worked_examples(problem):
    """Return our own worked examples for the family of `problem`.

    A mathematical problem with LaTeX in its text (a command, or $...$, but not two prices) counts as competition
    mathematics, any other as a word problem, whatever file it comes from."""
    family = problem["kind"]
    if family == "math":
        latex = re.search(r"\\[A-Za-z(\[]|\$(?!\s)[^$]*(?<!\s)\$(?!\d)", problem["problem"])
        family = "competition" if latex else "grade-school"
    return [{"problem": text, "solution": solution} for text, solution in EXAMPLES[family]]


def evaluate(run, file, model, tests, prompt, **settings):
    """Score a model by one greedy answer per problem. Return {"test": score, "held_out": score}.

    tests has the same keys: {"test": problems, "held_out": problems}, or one of them. Answers go to `file`.jsonl,
    scores to `file`.json, those of held-out problems to `file`_held_out."""
    scores = {}
    for kind, problems in tests.items():
        name = file if kind == "test" else f"{file}_{kind}"
        responses = sample(run, f"{name}.jsonl", model, problems, 1, prompt, temperature=0.0, **settings)
        scores[kind] = run.once(f"{name}.json", score, problems, responses)
        run.metrics.get(round_and_phase(name), {}).update(accuracy=scores[kind]["accuracy"])
    return scores


def score(problems, responses):
    """Return {accuracy, interval, n, by_level, by_set, correct: {id: 0 or 1}, level: {id: level}}, one answer each."""
    correct = {r["id"]: int(r["correct"]) for r in responses}
    level = {p["id"]: p["level"] for p in problems if "level" in p}
    parts = defaultdict(list)
    for i, right in correct.items():
        parts["by_set", i.rpartition("/")[0]].append(right)
        if i in level:
            parts["by_level", level[i]].append(right)
    found = accuracy(correct.values()) | {"by_level": {}, "by_set": {}}
    for by, part in sorted(parts):
        found[by][part] = accuracy(parts[by, part])
    return found | {"correct": correct, "level": level}


def accuracy(correct):
    """Return {accuracy, interval, n} of a list of zeros and ones."""
    right = sum(correct)
    return {"accuracy": right / len(correct), "interval": wilson_interval(right, len(correct)), "n": len(correct)}


def wilson_interval(right, n):
    """Return [low, high], the 95% interval of the share of `right` in n (Wilson 1927)."""
    z = 1.959964
    centre = (right + z * z / 2) / (n + z * z)
    half = z * math.sqrt(right * (n - right) / n + z * z / 4) / (n + z * z)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def show_answers(run, t, problems, responses):
    """Print one right and one wrong response of round t in full, to show what is behind the numbers."""
    by_id = {p["id"]: p for p in problems}
    order = run.rng(t, "shown").permutation(len(responses))
    examples = {responses[i]["correct"]: responses[i] for i in order}  # keeps the last of each
    for correct, response in examples.items():
        problem = by_id[response["id"]]
        text = response["text"].replace("\n", "\n    ")
        say(f"  {'right' if correct else 'wrong'}: {problem['problem']}\n    {text}\n"
            f"    ({response['reason']}; the answer is {problem['answer']})")


def end_round(run, t, keep=()):
    """Log the FLOPs of sampling, rewards and training (not of scoring) up to the end of round t; delete models
    according to KEEP_MODELS, except those in `keep`."""
    costs = {"total_flops": 0.0, "total_spent_flops": 0.0}
    for (round, phase), values in run.metrics.items():
        if round <= t and not phase.startswith(("eval", "round")):
            for name in costs:
                costs[name] += values.get(name.removeprefix("total_"), 0)
    run.log(t, "round", **costs)
    say(f"  round {t}  FLOPs     {costs['total_flops']:.3g} so far, without scoring; with draws that did not count "
        f"{costs['total_spent_flops']:.3g}")
    if rank() == 0 and run.constants["KEEP_MODELS"]:
        for older in range(t - run.constants["KEEP_MODELS"] + 1):
            model = run.folder / f"round_{older}/model"
            if str(model) not in keep:
                for path in model.glob("*.safetensors"):  # the folder stays to mark the phase as done
                    path.unlink()


def print_table(scores, first):
    """Print {name: score} as rows: accuracy, interval, accuracy by level; below each its sets, if there are several."""
    rows = {}
    levels = set()
    for name, score in scores.items():
        rows[name] = score
        levels.update(score.get("by_level", {}))
        if len(score.get("by_set", {})) > 1:
            for part, of_part in score["by_set"].items():
                rows[f"  {name}, {part}"] = of_part
    levels = sorted(levels, key=int)
    width = max(map(len, [first, *rows])) + 4
    say(f"\n{first:<{width}}problems  accuracy  95% interval   " + "".join(f"  level {level}" for level in levels))
    for name, score in rows.items():
        low, high = score["interval"]
        row = f"{name:<{width}}{score['n']:>8,}{score['accuracy']:>10.1%}  {low:>5.1%} - {high:>5.1%}"
        for level in levels:
            of_level = score.get("by_level", {}).get(level)
            row += f"{of_level['accuracy']:>9.1%}" if of_level else " " * 9
        say(row.rstrip())


def final_table(run, scores):
    """Print a table of a run's rounds for each kind of test problem."""
    [first, *_] = scores.values()
    for kind in first:
        print_table({name: score[kind] for name, score in scores.items()}, kind.replace("_", " "))
    say(f"{run.folder}/metrics.jsonl")


# Our own worked examples for prompts, by family, in the form that answers should take

EXAMPLES = {
    "grade-school": [
        ("Nora buys 3 notebooks at $2.50 each and a pen for $1.75. She pays with a $20 bill. How many dollars of "
         "change does she get?",
         "The notebooks cost 3*2.50 = 7.50 dollars.\n\nWith the pen she spends 7.50 + 1.75 = 9.25 dollars.\n\n"
         "Her change is 20 - 9.25 = 10.75 dollars.\n\n\\boxed{10.75}"),
        ("A ferry leaves at 9:40 am. It needs 35 minutes to cross, waits 15 minutes, and needs 40 minutes to come "
         "back. How many minutes before noon is it back?",
         "The trip takes 35 + 15 + 40 = 90 minutes.\n\nFrom 9:40 am to noon there are 140 minutes.\n\n"
         "It is back 140 - 90 = 50 minutes before noon.\n\n\\boxed{50}"),
        ("A 900-litre tank already holds 240 litres. One pump adds 18 litres a minute and another adds 12 litres a "
         "minute. How many minutes do both pumps together need to fill the tank?",
         "The tank still needs 900 - 240 = 660 litres.\n\nTogether the pumps add 18 + 12 = 30 litres a minute.\n\n"
         "Filling takes 660/30 = 22 minutes.\n\n\\boxed{22}"),
        ("Omar is 4 times as old as his niece. In 6 years he will be 3 times as old as she will be then. How old is "
         "Omar now?",
         "Let the niece be n years old, so Omar is 4n.\n\nIn 6 years, 4n + 6 = 3(n + 6) = 3n + 18.\n\n"
         "So n = 12, and Omar is 4*12 = 48.\n\n\\boxed{48}"),
        ("A coat is priced at $80. It is reduced by 25%, and then a 5% tax is added to the reduced price. How many "
         "dollars does the coat cost in the end?",
         "The reduction is 0.25*80 = 20 dollars, so the reduced price is 80 - 20 = 60 dollars.\n\n"
         "The tax is 0.05*60 = 3 dollars.\n\nThe final cost is 60 + 3 = 63 dollars.\n\n\\boxed{63}"),
        ("A farmer picks 240 melons. She sells 3/8 of them at the market and gives 1/5 of the rest to neighbors. How "
         "many melons does she have left?",
         "She sells 240*3/8 = 90 melons, which leaves 240 - 90 = 150.\n\nShe gives away 150/5 = 30 melons.\n\n"
         "She has 150 - 30 = 120 melons left.\n\n\\boxed{120}"),
        ("Kai's average on his first 4 quizzes is 81 points. What must he score on the fifth quiz so that the average "
         "of all 5 is exactly 83 points?",
         "The first 4 quizzes sum to 4*81 = 324 points.\n\nAll 5 must sum to 5*83 = 415 points.\n\n"
         "He needs 415 - 324 = 91 points.\n\n\\boxed{91}"),
        ("A painter mixes blue and white paint in the ratio 2 to 7 and gets 36 litres in all. How many more litres of "
         "white than of blue does the mix hold?",
         "There are 2 + 7 = 9 equal parts, so one part is 36/9 = 4 litres.\n\nWhite exceeds blue by 7 - 2 = 5 "
         "parts.\n\nThat is 5*4 = 20 litres.\n\n\\boxed{20}"),
    ],
    "competition": [
        ("Find the remainder when $x^5 + 2x^3 - 7$ is divided by $x^2 - 3$.",
         "Modulo $x^2 - 3$ we may replace $x^2$ by $3$.\n\nThen $x^5 = (x^2)^2 x = 9x$ and $2x^3 = 2 \\cdot 3x = "
         "6x$.\n\nThe remainder is $9x + 6x - 7 = 15x - 7$.\n\n\\boxed{15x - 7}"),
        ("What is the remainder when $7^{53}$ is divided by $18$?",
         "$7^2 = 49 \\equiv 13 \\pmod{18}$ and $7^3 \\equiv 7 \\cdot 13 = 91 \\equiv 1 \\pmod{18}$.\n\n"
         "Since $53 = 3 \\cdot 17 + 2$, $7^{53} \\equiv 1^{17} \\cdot 7^2 \\equiv 13 \\pmod{18}$.\n\n\\boxed{13}"),
        ("A bag holds $4$ red, $5$ green and $3$ blue marbles. Three marbles are drawn at random without replacement. "
         "What is the probability that all three colors are drawn? Give a fraction in lowest terms.",
         "There are $\\binom{12}{3} = 220$ equally likely draws.\n\nOne marble of each color can be drawn in "
         "$4 \\cdot 5 \\cdot 3 = 60$ ways.\n\nThe probability is $\\frac{60}{220} = \\frac{3}{11}$.\n\n"
         "\\boxed{\\frac{3}{11}}"),
        ("In triangle $PQR$, $PQ = 6$, $PR = 10$ and $\\angle P = 60^\\circ$. Find $QR$ in simplest radical form.",
         "By the law of cosines, $QR^2 = 6^2 + 10^2 - 2 \\cdot 6 \\cdot 10 \\cdot \\cos 60^\\circ$.\n\n"
         "This is $36 + 100 - 60 = 76 = 4 \\cdot 19$.\n\nHence $QR = 2\\sqrt{19}$.\n\n\\boxed{2\\sqrt{19}}"),
        ("Find all real $x$ with $\\frac{2x - 7}{x + 3} \\le 1$. Answer in interval notation.",
         "Subtract $1$ from both sides: $\\frac{2x - 7 - (x + 3)}{x + 3} = \\frac{x - 10}{x + 3} \\le 0$.\n\n"
         "The quotient is negative exactly for $-3 < x < 10$.\n\n"
         "It is $0$ at $x = 10$ and undefined at $x = -3$.\n\n\\boxed{(-3, 10]}"),
        ("Find the point $(x, y)$ on the line $3x + 4y = 50$ that is nearest to the origin.",
         "The nearest point lies on the normal through the origin, so $(x, y) = (3t, 4t)$ for some $t$.\n\n"
         "Then $9t + 16t = 50$, so $t = 2$.\n\nThe point is $(6, 8)$.\n\n\\boxed{(6, 8)}"),
        ("Write $\\frac{(2 + i)^3}{1 - i}$ in the form $a + bi$ with real $a$ and $b$.",
         "$(2 + i)^2 = 3 + 4i$, so $(2 + i)^3 = (3 + 4i)(2 + i) = 2 + 11i$.\n\nMultiply top and bottom by $1 + i$: "
         "$\\frac{(2 + 11i)(1 + i)}{2} = \\frac{-9 + 13i}{2}$.\n\n\\boxed{-\\frac{9}{2} + \\frac{13}{2}i}"),
        ("Let $A = \\begin{pmatrix} 2 & 1 \\\\ 0 & 2 \\end{pmatrix}$. Find $A^4$.",
         "Squaring gives $A^2 = \\begin{pmatrix} 4 & 4 \\\\ 0 & 4 \\end{pmatrix}$.\n\nSquaring again, the diagonal "
         "entries are $4 \\cdot 4 = 16$.\n\nThe upper right entry is $4 \\cdot 4 + 4 \\cdot 4 = 32$, and the lower "
         "left entry stays $0$.\n\n\\boxed{\\begin{pmatrix} 16 & 32 \\\\ 0 & 16 \\end{pmatrix}}"),
    ],
    "choice": [
        ("A closed glass bottle filled to the brim with water cracks overnight in a freezer. What best explains this?\n"
         "(A) Glass melts in the cold\n(B) Water expands as it freezes\n(C) Cold air dissolves glass\n"
         "(D) Ice weighs more than the water it formed from",
         "The water in the freezer turns to ice.\n\nIce takes up more room than the same mass of water, and a full "
         "bottle has no room to spare.\n\nSo the growing ice breaks the glass.\n\n\\boxed{B}"),
        ("Tom wants soup to stay hot on a two-hour walk to a friend. What should he carry it in?\n(A) a paper cup\n"
         "(B) an open glass bowl\n(C) a thin plastic bag\n(D) a closed vacuum flask\n(E) a metal plate",
         "Soup stays hot if little heat can leave it.\n\nA cup, an open bowl, a thin bag and a plate all lose heat "
         "quickly.\n\nA closed vacuum flask is made to hold heat in.\n\n\\boxed{D}"),
        ("Two equal towels are equally wet. One hangs spread out in a dry wind and the other lies folded in a closed "
         "box. Why does the hanging towel dry sooner?\n(A) More of its surface meets dry moving air\n"
         "(B) It held less water at the start\n(C) Sound from the wind heats it\n(D) The box makes new water",
         "Water leaves a towel by evaporating from its surface.\n\nSpreading it out gives more surface, and dry wind "
         "carries the vapor away.\n\nIn the box little surface is open and the air soon becomes damp.\n\n\\boxed{A}"),
        ("One machine makes 7 parts every 4 minutes and another makes 5 parts every 6 minutes. How many parts do they "
         "make together in 2 hours?\n(A) 220\n(B) 250\n(C) 280\n(D) 300\n(E) 310",
         "Two hours are 120 minutes.\n\nThe first makes 120/4*7 = 210 parts and the second 120/6*5 = 100 parts.\n\n"
         "Together they make 210 + 100 = 310 parts.\n\n\\boxed{E}"),
        ("Ines set her plug-in clock to ring at 6:00. She woke at 8:00 in a silent room, and the clock's display was "
         "dark. What most likely happened?\n(A) She had set the clock to ring at 8:00\n(B) Noisy neighbors woke her\n"
         "(C) The clock lost power in the night\n(D) The clock ran too fast",
         "A dark display means that the clock has no power.\n\nWithout power it could not ring at 6:00.\n\n"
         "The other options do not explain a dark display.\n\n\\boxed{C}"),
        ("Two equal lamps are connected in parallel to one ideal battery. One lamp is unscrewed. What happens to the "
         "other lamp?\n(A) It goes out\n(B) It becomes dimmer\n(C) It becomes brighter\n(D) It stays just as bright",
         "In parallel, each lamp is connected to the full battery voltage.\n\nAn ideal battery keeps that voltage when "
         "one lamp is removed.\n\nSo the current in the other lamp does not change.\n\n\\boxed{D}"),
    ],
    "label": [
        ("Premise: The town library opened a second reading room after a gift from a retired teacher.\n"
         "Hypothesis: The retired teacher had once worked in the town.\n"
         "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.",
         "The premise says that a retired teacher gave a gift to the library.\n\nIt does not say where the teacher had "
         "worked, so the hypothesis may be true or false.\n\n\\boxed{neutral}"),
        ("Premise: Nine climbers set out, and exactly three of them reached the summit before the storm.\n"
         "Hypothesis: Six of the climbers who set out did not reach the summit before the storm.\n"
         "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.",
         "Exactly three of nine climbers reached the summit before the storm.\n\n"
         "The other 9 - 3 = 6 did not, as the hypothesis says.\n\n\\boxed{entailment}"),
        ("Premise: The corner bakery has been closed all day on every Monday since it opened in 2010.\n"
         "Hypothesis: Customers bought bread in the corner bakery on a Monday in 2015.\n"
         "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.",
         "Every Monday in 2015 falls after the opening, so the bakery was closed on all of them.\n\n"
         "Customers cannot have bought bread there on such a day.\n\n\\boxed{contradiction}"),
        ("Premise: Ada's third novel was translated into Dutch before it was printed in her own country.\n"
         "Hypothesis: Ada has written more than one novel.\n"
         "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.",
         "The premise speaks of Ada's third novel, so she has written at least three.\n\n"
         "Three is more than one, so the hypothesis must be true.\n\n\\boxed{entailment}"),
        ("Premise: The violinist played the concerto from memory, and the audience stood and clapped.\n"
         "Hypothesis: The violinist had played the concerto in public before.\n"
         "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.",
         "Playing from memory shows that the violinist knew the piece well.\n\nThat could come from practice alone, so "
         "an earlier concert is possible but not certain.\n\n\\boxed{neutral}"),
        ("Premise: The bridge was finished in March 1931, and the first train crossed it exactly two years later.\n"
         "Hypothesis: A train crossed the bridge in 1932.\n"
         "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction.",
         "The first train crossed in March 1933.\n\nNo train can have crossed before the first one, so none crossed in "
         "1932.\n\n\\boxed{contradiction}"),
    ],
    "yesno": [
        ("Half of all patients are mild cases and half are severe. Severity is the only common cause of taking a drug "
         "and of recovery. Mild cases recover in 90% with the drug and 85% without; severe cases in 50% with and 40% "
         "without. Of those who take the drug 20% are mild; of the others 80% are mild.\n"
         "Does taking the drug raise the chance of recovery over all patients?",
         "Severity is a confounder, so we weigh both groups by their share of all patients.\n\n"
         "If all took the drug: 0.5*0.90 + 0.5*0.50 = 0.70. If none did: 0.5*0.85 + 0.5*0.40 = 0.625.\n\n"
         "0.70 > 0.625, so the drug raises the chance.\n\n\\boxed{yes}"),
        ("In a school 30% of pupils are good at music and 30% are good at chess, independently. A club has as members "
         "exactly the pupils who are good at music, at chess, or at both.\n"
         "Among club members, are those good at music more likely to be good at chess than members overall?",
         "A pupil is a member with chance 1 - 0.7*0.7 = 0.51. Among members the chance of chess is 0.3/0.51, about "
         "0.59.\n\nAll who are good at music are members, so among them the chance of chess is still 0.30.\n\n"
         "0.30 < 0.59: membership is a collider and makes the skills compete.\n\n\\boxed{no}"),
        ("Frost comes on 20% of nights. A warning lamp lights on 90% of frost nights and on 10% of other nights. The "
         "lamp has no effect on the weather. Tonight Ben switches the lamp on by hand, without knowing the weather.\n"
         "Is the chance of frost tonight now higher than 20%?",
         "Seeing the lamp light by itself would give 0.18/(0.18 + 0.08), about 0.69.\n\n"
         "But Ben sets the lamp, which cuts its link with frost.\n\nThe chance of frost stays at 0.20.\n\n\\boxed{no}"),
        ("A pump runs exactly when the mains or a generator gives power. The mains is on 90% of days and the generator "
         "on 30% of days, independently. Today both were on and the pump ran.\n"
         "Had the mains been off today, all else as it was, would the pump have run?",
         "We know that the generator was on today, so its chance today is 1 and not 0.30.\n\n"
         "Switching off the mains does not change the generator.\n\nThe generator alone makes the pump run.\n\n"
         "\\boxed{yes}"),
        ("A fertilizer raises the chance that a plant grows tall from 30% to 60%. Tall plants fall over in 50% of "
         "cases, other plants in 10%. The fertilizer acts on falling only through height, and nothing else affects "
         "both.\nDoes the fertilizer lower the chance that a plant falls over?",
         "With fertilizer the chance of falling is 0.6*0.5 + 0.4*0.1 = 0.34.\n\n"
         "Without it the chance is 0.3*0.5 + 0.7*0.1 = 0.22.\n\n0.34 > 0.22, so it raises the chance.\n\n\\boxed{no}"),
        ("A fair coin decides who of many pupils gets a letter about a course. With the letter 60% go and 71% pass a "
         "test; without it 20% go and 63% pass. The letter affects passing only through the course and keeps nobody "
         "away.\nFor pupils who go only if they get the letter, does the course raise the chance of passing?",
         "The coin is random, so the letter raises passing by 0.71 - 0.63 = 0.08 and going by 0.60 - 0.20 = 0.40.\n\n"
         "Only the pupils whom the letter sends to the course can change, so their gain is 0.08/0.40 = 0.20.\n\n"
         "A gain of 0.20 is positive.\n\n\\boxed{yes}"),
    ],
}
