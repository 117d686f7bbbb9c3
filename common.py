"""What the method scripts share: mechanics, and nothing about a method.

Sections, each readable alone: 1 checking, 2 run, 3 processes, 4 problems and prompts, 5 sampling, 6 log-probabilities,
7 packing, 8 training, 9 saving, 10 accounting, 11 process rewards, 12 clusters of texts.

Records are JSON lines:
  problem    {id, problem, answer, kind} and, where the data has them, solution, level, tags, choices. id is
             set/split/line of the source file, so that a dropped record shifts nobody's seed; kind is how to grade:
             "math", "choice" (answer is a letter), "label" (answer is one of choices), "yesno".
  response   {id, draw, text, tokens, finish, correct}: draw counts from 0 per problem and round, tokens is the number
             generated, finish is "stop" (ended by itself) or "length" (cut); with a PRM also reward and step_rewards.
  selection  {id, ...}: every number the method decided from; each script says which.
  example    {id, prompt, completions, end}: what is trained on. One completion for SFT, [chosen, rejected] for DPO; the
             loss is on the completions and on the end token after each, never on the prompt.

A run folder:
  runs/<name>/constants.json, metrics.jsonl, the source files
  runs/<name>/round_<t>/*.jsonl, model/, eval.json
  runs/<name>/unfinished/    what the phase at work has so far; gone when it ends

Shapes: T tokens of a packed batch, P of them predicted, S sequences, H hidden size, V vocabulary.
"""
import argparse
import array
import atexit
import contextlib
import ctypes
import difflib
import fcntl
import functools
import gc
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import queue
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import unicodedata
from collections import Counter, defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import packages_distributions, version
from pathlib import Path

# 1. Checking: model output is untrusted text, so it is compared in processes that can be killed -----------------------
# This stands first, and imports nothing big, because run as a program this file is such a process.

CHECK_SECONDS = 2  # processor time after which a checking worker is killed; after half of it, it is asked to stop
CHECK_BYTES = 2 << 30  # address space of a worker
NO_VERDICT = ("bad_gold", "timeout", "memory", "crash", "forbidden")  # reasons for "wrong" without a comparison
YES_NO = ("yes", "no")

# The policy. A false "correct" weighs more than a false "wrong", since it becomes training data.
# 1. What a response states: `final_answer`, one place in the text and never a number from anywhere.
# 2. A letter, a label or yes/no is read by `letter_of` and `label_of`; two at once, or a denied one, are none.
# 3. A mathematical answer is right if it is the gold text; else both are rewritten (`normalize`), and compared as text
#    where that is enough (`equal_as_text`); else math-verify compares them, both in a box, in a process with limits.
# 4. What math-verify takes for equal and is not, is wrong: `clearly_different`, `sound`. Units are not compared.


def last_boxed(text):
    r"""The content of the last balanced \boxed{...} (or brace-less \boxed 9), or None. Linear in the text."""
    opened, last = [], None
    for mark in re.finditer(r"(?<!\\)\\+boxed(?:\s*\{|\s+([^\s{}$\\]+))|\\.|\{|\}", text, re.DOTALL):
        token = mark[0]
        if "boxed" in token and token.endswith("{"):
            opened.append(mark.end())
        elif "boxed" in token:
            last = mark[1].rstrip(".,;:")
        elif token == "{":
            opened.append(None)
        elif token == "}" and opened:
            start = opened.pop()
            if start is not None:
                last = text[start:mark.start()]
    return last


STATED = r"(?i)\banswer\**\s*(?:is|:)(?!\**\s*(?:correct|helpful|clear|right|reasonable|wrong)\b)(?:[\s:*]|\\\[|\$\$)*"
LAST_LINE = r"^[ \t]*A:(?=[ \t]*[-+$\\(.\d])"  # of GSM8K's early solutions
MATH = re.compile(r"\$\$([^$]+)\$\$|\$([^$\n]+)\$|\\\(([^\n]+?)\\\)|\\\[(.+?)\\\]|\*\*([^*\n]+)\*\*", re.DOTALL)
LONG = 2000  # characters, plus twice the gold's, beyond which an answer is not compared: it is not this one
ONE_LINE = 200  # characters up to which a response of one line is taken to be nothing but an answer


def final_answer(text):
    r"""What a response states as its answer, as it is written there; None if it states none. In what stands behind the
    last </think>, the first of these that there is:

    the last balanced \boxed{}; the line behind the last "####"; the sentence behind the last "answer is", "answer:" or
    (before a number) "A:" at the beginning of a line; the whole text, if it is one line of at most 200 characters."""
    text = text.rsplit("</think>", 1)[-1]
    stated = last_boxed(text) if "boxed" in text else None
    if stated is None and "####" in text:
        line, _, more = text.rsplit("####", 1)[1].strip().partition("\n")
        stated = line if not more or re.search(r"\d", line) and ":" not in line else None  # else a heading
    where, said = (text, f"{STATED}|{LAST_LINE}") if stated is None else (stated, STATED)
    marks = list(re.finditer(said, where, re.MULTILINE))
    if marks:
        sentence = re.split(r"[.!](?:\s|\**$)|<\|", where[marks[-1].end():].strip().split("\n")[0])[0]
        sentence = re.split(r",?\s(?:because|since|as|so|which|where|when)\b", sentence)[0]
        stated = re.sub(r"^[A-Za-z](?:[^\d$\\(*,;:]|\$[A-Za-z]+\$)*\b(?:is|are) ", "", sentence)  # the sum is 12
    elif stated is None and len(text) <= ONE_LINE and "\n" not in text.strip() and "boxed" not in text:
        stated = text
    return (stated or "").strip() or None


OTHERWISE = (r"(?i)\b(?:not|never|no|or|and|between|than|least|most|approximately|about|almost|nearly|minus|negative|"
             r"plus|twice|half|double|triple|multiples?|power|square|cube|root|all|any|except|but|if|when|for|unlike|"
             r"dozen|(?:hundred|thousand|million|billion|trillion)s?)\b|n't|\\")


def piece_of(sentence):
    r"""The one piece of mathematics ($...$, \[...\], bold) in a sentence whose words change nothing; or all of it."""
    pieces = list(MATH.finditer(sentence))
    if len(pieces) != 1:
        return sentence
    before, after = sentence[:pieces[0].start()].rstrip(), sentence[pieces[0].end():].lstrip()
    joined = re.search(r"[\d+\-*/=^<>]$", before) or re.match(r"[\d+\-*/=^<>%]", after)
    words = f"{before} {after}"
    if joined or not re.search(r"[^\W\d_]{2}", words) or re.search(OTHERWISE, words):
        return sentence
    return next(filter(None, pieces[0].groups()))


UNIT_WORD = r"\\(?:text|mbox|textbf|textrm|mathrm)\s*\{([^{}]{0,60})\}"
WORD = r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|boldsymbol|underline|operatorname)\s*\{([^{}]{0,60})\}"
NOT_UNITS = (r"(?i)\W*([ie]|pi|percent|pct|[ap]\.?m\.?|.*\b((hundred|thousand|million|billion|trillion|dozen|tenth)s?"
             r"|or|and|to|not|than|most|least|more|less|mod|base|is|if|plus|minus|below|above|remainder|wrong|"
             r"sin|cos|tan|log|exp|sqrt|root|pi)\b.*"
             r"|.*\d.*)\W*")
UNITS = (r"(?:square |cubic |sq |cu )?(?:degree|dollar|cent|euro|pound|inch(?:e(?=s))?|foot|feet|ft|yard|mile|cm|mm|km|"
         r"mg|kg|(?:centi|kilo|milli)?met(?:er|re)|gram|ounce|oz|lb|gallon|lit(?:er|re)|ml|second|sec|minute|min|hour|"
         r"hr|day|week|month|year|unit|mph|people|student|point|way|time)s?")
MIXED = (r"^(-?\d+) (\d+) ?/ ?(\d+)$", r"\1\\frac{\2}{\3}")  # 1 1/2
REWRITE = [(re.compile(pattern), by) for pattern, by in (  # in this order
    (r"(?<!\\)\\(?:text)?color\s*\{\w*\}|(?<!\\)\\[()\[\]]|\\?\$|\\displaystyle(?![a-z])", ""),
    (r"(?<=\d)(?:,?\\!\s*|\{,\})+(?=\d{3})", ""),  # 1,\!000 and 1{,}000
    (r"(?<!\\)\\[,;:> ]|~|\s+", " "),
    (r"\\!", ""),
    MIXED,
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?! ?\d)", lambda m: m[0].replace(" ", "")),  # 1 000
    (r"(?<!\\)\{\d{1,3}(?:,\d{3})+\}", lambda m: m[0].replace(",", "")),  # \frac{12}{5,525}
    (r"^\s*[A-Za-z]\([^()=]*\)\s*=(?=[^=]*$)", ""),  # f(2) = 5
    (r"\\(?:text|mbox)\s*\{\s*(?:percent|pct)\s*\}", r"\%"),
    (r"^[=+\s*]+|(?:[.,;:\s*]|\\\\)+$", ""),  # what stands around: a full stop, **bold**
    (rf"^\{{?\s*{WORD}\s*\}}?$", lambda m: m[1].strip()),
    (r"^(-?[\d.]+)[eE]([+-]?\d+)$", r"\1\\cdot10^{\2}"),  # 1e3
    (rf"(?:(?<=[\d}})])|(?<=\\pi)|(?<=\\pi ))\s*(?:{UNIT_WORD}(?:\^\{{?\d\}}?)?|(?:{UNITS})(?:\^\{{?\d\}}?|\d)?)$",
     lambda m: m[0] if m[1] is not None and re.fullmatch(NOT_UNITS, m[1]) else ""),  # 4 feet, 5\text{ cm}^2
    (r"^(-?\d[\d.,]*)( [a-z]{3,}(?: [a-z]+){0,3})$",
     lambda m: m[0] if re.fullmatch(NOT_UNITS, m[2]) else m[1]),  # 18 eggs
    MIXED,
    (r"[.,;:\s]+$", ""),
)]


@functools.lru_cache(1 << 17)
def normalize(answer):
    r"""An answer as it goes to math-verify: what that does not read, or reads wrongly, rewritten. Linear in the text.

    Digits of all scripts, full-width forms, superscripts and fractions of Unicode; $, \( and bold around it; thousands
    apart by blanks or \, and \!; mixed fractions; 1e3; units behind a number; a full stop at the end."""
    if not answer.isascii():
        answer = re.sub("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", answer)  # 10²³
        answer = re.sub("√ *([0-9]+|[a-z]|\\([^()]*\\))", r"\\sqrt{\1}", "".join(map(_latex_of, answer)))
    for pattern, by in REWRITE:
        answer = pattern.sub(by, answer)
    return answer


def _latex_of(c):
    """A character as LaTeX and ASCII have it."""
    kind = unicodedata.decomposition(c).split(" ")[0]
    if unicodedata.decimal(c, None) is not None:
        return str(unicodedata.decimal(c))
    if kind == "<fraction>":
        above, _, below = unicodedata.normalize("NFKC", c).partition("\u2044")
        return f"\\frac{{{above}}}{{{below}}}"
    if kind in ("<wide>", "<noBreak>"):
        return unicodedata.normalize("NFKC", c)
    if unicodedata.category(c) == "Cf":  # invisible
        return ""
    return {"−": "-", "–": "-", "∞": "\\infty ", "°": "^\\circ ", "µ": "\\mu "}.get(c, c)


def letter_of(answer, options=()):
    """The letter of the option that an answer means, by its letter ("B", "(b)", "B. a dog", "option B: ...") or its
    text; None if that is none, or two ("A or B"). Without options any letter will do."""
    def plain(text):
        text = re.sub(r"\\[()\[\]]|\\(?:left|right)(?![a-z])|\*\*|[$\"]", "", re.sub(
            WORD.replace("{0,60}", "*"), r" \1 ", text))
        return re.sub(r"\( ?([A-Za-z]) ?\)", r"(\1)", " ".join(text.split())).strip(".,:; ")

    answer, options = plain(answer), [plain(option).casefold() for option in options]
    letters = [chr(65 + i) for i in range(len(options) or 26)]
    if alone := re.fullmatch(r"\(?([A-Za-z])\)?", answer):
        return alone[1].upper() if alone[1].upper() in letters else None
    same = [letter for letter, option in zip(letters, options) if option == answer.casefold()]
    if len(same) == 1:
        return same[0]
    mark = re.match(r"(?:the )?(?:correct )?(?:(?:option|choice|answer)(?: is)?:? )?"
                    r"(?:\(([a-z])\)|([a-z])(?=$|[).,:;]|( )))[).,:;]*(.*)", answer, re.IGNORECASE)
    letter, blank, rest = ((mark[1] or mark[2]).upper(), mark[3], mark[4].strip()) if mark else ("", "", "")
    its_text = options[letters.index(letter)] if options and letter in letters else ""
    if letter in letters and its_text and rest.casefold() == its_text:
        return letter
    if letter in letters and not blank:  # with a blank it may be the article of "A dog"
        another = re.match(r"(?:or|and|/|&)?\s*\(?[A-H]\)?(?![A-Za-z' ])|(?:or|and|is (?:not|wrong|incorrect))\b", rest)
        return None if another or re.search(r"\([A-H]\)|\b[A-H][.)]", rest) else letter
    named = {*re.findall(r"\(([A-H])\)", answer)}  # "It is (B)"
    denied = re.search(OTHERWISE + r"|\b(?:neither|nor|cannot|wrong|incorrect|anything)\b", answer)
    return min(named) if len(named) == 1 and named <= {*letters} and not denied else None


def label_of(answer, labels):
    """The one of the labels that an answer names; None if it names none or two, or denies one ("not neutral")."""
    text = " ".join(re.sub(r"\\[a-z]+|[{}$*\"]", " ", answer).casefold().split())
    if labels == YES_NO:  # "no" begins other sentences too: "no way to tell"
        first = re.match(r"(?:(yes|true)\b(?! or\b|/)|(no|false)\b(?=\s*(?:$|[,.;:!(])))", text)
        return first and ("yes" if first[1] else "no")
    named = [label for label in labels if label and re.search(rf"(?<!\w){re.escape(label.casefold())}(?!\w)", text)]
    named = [label for label in named if not any(label in other and label != other for other in named)]
    before = text.partition(named[0].casefold())[0] if named else ""
    denied = re.search(r"\b(?:not|no|non|never|neither|nor|cannot|hardly|far)\b|n't", before)
    return named[0] if len(named) == 1 and not denied else None


class Checker:
    """Worker processes that compare answers (by math-verify, or a grader of one's own), replaced when they hang."""

    def __init__(self, workers, grader=""):
        self.threads = ThreadPoolExecutor(workers)  # a thread waits for its worker; the work is done in the process
        self.grader, self.idle, self.verdicts, self.broken = grader, queue.LifoQueue(), {}, False
        for _ in range(workers):
            self.idle.put(None)  # started when it is needed: what is told by the text alone needs none
        if grader:  # somebody's file may not work at all
            self.threads.submit(self._compare, ({"id": "", "problem": "", "answer": "", "kind": "math"}, "")).result()

    def _start(self):
        """A worker that is ready, which takes a second or two; ends the program if it does not start."""
        line, broken = b"", self.broken
        with contextlib.suppress(OSError):  # TimeoutError too
            if not broken:
                worker = subprocess.Popen([sys.executable, __file__, *filter(None, [self.grader])],
                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                if (line := self._line(worker, 300)) == b"ready\n":
                    return worker
        self.broken = True
        self.idle.put(None)  # or the other threads would wait for it, and the program could not end
        if broken:
            sys.exit(1)
        fail(f"a checking worker does not start: {line.decode().strip() or 'see what `python common.py` says'}")

    def submit(self, problem, text):
        """Future of (correct, reason): equal, different, no_answer, one of NO_VERDICT, or a grader's."""
        verdict, pair = (None, (problem, text)) if self.grader else judge(problem, text)
        key = json.dumps(pair) if self.grader else pair or verdict
        if len(self.verdicts) > 1 << 18:
            self.verdicts.clear()  # a file of millions would fill the memory
        if key not in self.verdicts:
            if verdict:
                self.verdicts[key] = Future()
                self.verdicts[key].set_result(verdict)
            else:
                self.verdicts[key] = self.threads.submit(self._compare, pair)
        return self.verdicts[key]

    def _compare(self, pair, again=True):
        worker = self.idle.get() or self._start()
        try:
            worker.stdin.write(json.dumps(pair).encode() + b"\n")
            worker.stdin.flush()
            verdict = tuple(json.loads(self._line(worker, 10 * CHECK_SECONDS)))
            self.idle.put(worker)
            return verdict
        except (OSError, ValueError) as error:  # no answer in time; or it is dead, perhaps not by this case: try again
            worker.kill()
            late = worker.wait() == -signal.SIGXCPU or isinstance(error, TimeoutError)
            self.idle.put(None)
            if late:
                return False, "timeout"
            return self._compare(pair, again=False) if again else (False, "crash")

    @staticmethod
    def _line(worker, seconds):
        waiting = select.poll()  # unlike select.select, for any number of open files
        waiting.register(worker.stdout, select.POLLIN)
        if not waiting.poll(1000 * seconds):
            raise TimeoutError
        return worker.stdout.readline()


def judge(problem, text):
    """((correct, reason), None) where the text tells, else (None, (gold, answer)): what math-verify is to compare."""
    gold, answer, kind = problem["answer"], final_answer(text), problem.get("kind", "math")
    gold = last_boxed(gold) or gold if gold.count("boxed") == 1 else gold
    if not gold.strip():
        return (False, "bad_gold"), None
    if answer is None:
        return (False, "no_answer"), None
    if kind != "math":
        meant_by, options = (letter_of, ()) if kind == "choice" else (label_of, YES_NO)
        options = problem.get("choices", options)
        right, meant = meant_by(gold, options), meant_by(answer, options)
        reason = "bad_gold" if right is None else "no_answer" if meant is None else "equal" if meant == right else ""
        return (reason == "equal", reason or "different"), None
    equal = answer == gold
    if not equal and len(answer) <= LONG + 2 * len(gold):
        answer = piece_of(answer) if piece_of(gold) == gold else answer
        gold, answer = normalize(gold), normalize(answer)
        if not answer:
            return (False, "no_answer"), None
        equal = equal_as_text(gold, answer)
        if equal is None:
            return None, (gold, answer)
    return (equal, "equal" if equal else "different"), None


def equal_as_text(gold, answer):
    """Whether two normalized answers are equal; None where only math-verify can tell."""
    if gold == answer:
        return True
    if re.fullmatch(r"-?\d+", gold) and re.fullmatch(r"-?\d+", answer):
        return re.sub("^(-?)0+(?=.)", r"\1", gold) == re.sub("^(-?)0+(?=.)", r"\1", answer)
    if re.fullmatch(r"[A-Z]|\([A-Z]\)( .*)?", gold):
        alone = r"(?i)\(?[A-Z]\)?|(?:\([A-Z]\)|[A-Z](?:[.:)]|,(?= [a-z]))) *(?!or\b|and\b)[^-+=^*/,]*"
        return bool(re.fullmatch(alone, re.sub(WORD, r"\1 ", answer))) and letter_of(answer) == letter_of(gold)
    if re.search(r"\bnot\b", answer) and "not" not in gold:
        return False
    words = [re.sub(r"^(the|an?) ", "", a.casefold()) for a in (gold, answer)]
    if re.fullmatch(r"[a-z' -]*[a-z]{2}[a-z' -]*", words[0]):  # else "listen" is "silent", a product of letters
        return words[0] == words[1]
    bases = [re.findall(r"\d_\{?(\d+)", a) for a in (gold, answer)]
    if all(bases) and bases[0] != bases[1]:  # math-verify does not read them
        return False
    if any(re.search(r"(?<!frac )(?<!binom )\b\d+ \d", a) for a in (gold, answer)):
        return False  # "7 8": math-verify multiplies
    gold, answer = (re.sub(r"\\(?:left|right|[,;! ])|\s|(?<=\\)[dt](?=frac)", "", a) for a in (gold, answer))
    return True if gold == answer else None


class Late(BaseException):
    """A case has used its time. Not an Exception: those are caught all over sympy."""


class Forbidden(BaseException):
    """A case would have done what no comparison needs."""


def confine():
    """Take from this process what no comparison needs: writing files, starting programs, connections. sympy evaluates
    as Python what it makes of some texts (numbers and names, as far as is known); should more get through, it finds
    nothing to do. Of the limits the kernel's own come first; NPROC does not bind root."""
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))
    sys.dont_write_bytecode = True
    barred = {"os", "subprocess", "socket", "shutil", "ctypes", "pty", "tempfile", "fcntl", "mmap", "signal", "sqlite3"}

    def refuse(event, arguments):
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event.partition(".")[0] in barred and event not in ("os.listdir", "os.scandir"):
            raise Forbidden

    sys.addaudithook(refuse)


def checking_worker(grader=""):
    """The program of a worker: a line of JSON in, a line [correct, reason] out; "ready" before the first.

    A line is [gold, answer] for math-verify or, with a grader of one's own ("file.py:function"), [problem, text]."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a verdict
    resource.setrlimit(resource.RLIMIT_AS, (CHECK_BYTES, CHECK_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def late(*_):
        raise Late

    signal.signal(signal.SIGPROF, late)
    try:
        compare = own_grader(grader) if grader else math_verify_grader()
    except Exception as error:  # whatever somebody's file raises
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=out, flush=True)
        return
    if not grader:
        confine()
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        # Limits in processor time, so that a verdict does not depend on what else runs here. Python may not get to
        # ask (a huge power is one instruction): then the kernel ends this process, at a whole second after these.
        until = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) + CHECK_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (1 + int(until), resource.RLIM_INFINITY))
        try:
            try:
                signal.setitimer(signal.ITIMER_PROF, CHECK_SECONDS / 2, 0.1)
                verdict = compare(*json.loads(line))
            finally:  # not later: freeing what a late case holds takes time too
                signal.setitimer(signal.ITIMER_PROF, 0)
            verdict = bool(verdict[0]), str(verdict[1])
        except Late:
            verdict = False, "timeout"
        except Forbidden:
            verdict = False, "forbidden"
        except MemoryError:
            verdict = False, "memory"
        except Exception:  # untrusted text in a symbolic parser: any failure is a wrong answer, and counted
            verdict = False, "crash"
        signal.setitimer(signal.ITIMER_PROF, 0)  # should it have fired in that very line
        print(json.dumps(verdict), file=out, flush=True)
        if verdict[1] == "memory":
            return  # a new worker has its memory back


def own_grader(name):
    """The function that --grader file.py:function names."""
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"--grader {name}: not file.py:function")
    spec = importlib.util.spec_from_file_location("grader", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def math_verify_grader():
    """compare(gold, answer) -> (correct, reason) by math-verify, both in a box, as `normalize` leaves them."""
    import logging

    import math_verify.parser
    from antlr4.atn.ParserATNSimulator import ParserATNSimulator, PredictionMode
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    logging.disable(logging.CRITICAL)
    # Units are ours to drop: math-verify takes the last letter of 2t for one.
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"))]
    golds, mode, latex2sympy = {}, [PredictionMode.LL], math_verify.parser.latex2sympy
    # ANTLR's two stages, as its authors advise: where the faster mode finds no error, it finds what the other would.
    ParserATNSimulator.predictionMode = property(lambda self: mode[0], lambda self, _: None)

    def in_two_stages(*arguments, **more):
        try:
            mode[0] = PredictionMode.SLL
            return latex2sympy(*arguments, **more)
        except Exception:
            mode[0] = PredictionMode.LL
            return latex2sympy(*arguments, **more)

    math_verify.parser.latex2sympy = in_two_stages

    def parsed(answer):
        return parse(f"\\boxed{{{answer}}}", extraction_config=config, parsing_timeout=None)

    def compare(gold, answer):
        golds[gold] = golds.get(gold) or parsed(gold)
        if not golds[gold]:
            return False, "bad_gold"
        answers = parsed(answer)
        if not answers:
            return False, "different"
        pair = golds[gold][0], answers[0]
        correct = not clearly_different(*pair) and verify(
            golds[gold], answers, allow_set_relation_comp=True, timeout_seconds=None) and sound(*pair)
        return correct, "equal" if correct else "different"

    compare("1", "\\frac{2}{2}")  # builds the parser
    return compare


def clearly_different(gold, answer):
    """Whether two parsed answers have other values at a point, or one is a number and the other a set or a tuple, or
    both are equations without a common symbol.

    Told ten times faster than by simplifying their difference, as math-verify does. It also tells tiny numbers apart:
    math-verify rounds at six decimals."""
    from latex2sympy2_extended import is_expr_of_only_symbols
    from sympy import Eq, Expr, Set, Tuple, UnevaluatedExpr
    if isinstance(gold, Eq) and isinstance(answer, Eq):
        if not gold.free_symbols & answer.free_symbols:
            return gold.rhs != answer.rhs
        if gold.lhs == answer.lhs and gold.lhs.is_Symbol:  # y = this and y = that
            gold, answer = gold.rhs, answer.rhs
    pair = gold, answer
    if not all(isinstance(side, Expr) for side in pair):
        return any(isinstance(side, Expr) and not side.free_symbols for side in pair) and any(
            isinstance(side, (Set, Tuple)) and len(side.args) > 1 for side in pair)
    names = sorted({symbol.name.lower() for side in pair for symbol in side.free_symbols})
    if any(side.has(UnevaluatedExpr) for side in pair) or names and all(map(is_expr_of_only_symbols, pair)):
        return False  # a percentage; or letters, which may be a word
    try:
        gold, answer = (side.subs({symbol: 0.41 + 0.17 * names.index(symbol.name.lower())
                                   for symbol in side.free_symbols}).doit().evalf() for side in pair)
        return bool(abs(gold - answer) > 1e-3 * abs(gold))
    except Exception:  # no number there, for one of many reasons
        return False


def sound(gold, answer):
    """False of what math-verify takes for equal and is not: an equation for a value (5 = 3, 2x = 6 or a + b = 3 for 3),
    and equations with a symbol times a matrix, of which it reads nothing."""
    from sympy import Add, Eq, MatrixBase, MatrixExpr, Mul, Number, Pow, simplify
    from sympy.core.relational import Relational

    def names_a_value(equation):
        left = equation.lhs
        if not equation.free_symbols:
            return simplify(left - equation.rhs) == 0  # 3 + 4 = 7
        return not (left.has(Add, Pow) or isinstance(left, Mul) and left.has(Number))  # x = 7

    equations, relations = ([e for e in (side, *getattr(side, "args", ())) if isinstance(e, Relational)]
                            for side in (answer, gold))
    if equations and not relations:
        return all(names_a_value(e) for e in equations if isinstance(e, Eq))
    if isinstance(answer, Eq) and isinstance(gold, Eq):
        sides = [side for side in (*gold.args, *answer.args) if not isinstance(side, MatrixBase)]
        return not any(side.has(MatrixBase, MatrixExpr) for side in sides)
    return True


if __name__ == "__main__":  # as a program this file is such a worker, and what follows (torch) is not for it
    checking_worker(*sys.argv[1:])
    sys.exit()

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else two runs side by side spin, and crawl
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch.distributed import get_rank as rank, get_world_size as world_size
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not torch.cuda.is_available():  # vllm's wheel brings CUDA builds of these, which break transformers on a CPU torch
    for package in ("torchvision", "torchaudio", "torchcodec"):
        sys.modules.setdefault(package, None)
from transformers import (AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM,  # noqa: E402
                          AutoTokenizer, GenerationConfig, TopKLogitsWarper, TopPLogitsWarper)
from transformers.utils.logging import disable_progress_bar  # noqa: E402

disable_progress_bar()

GROUP = 64  # requests that transformers.generate answers as one batch, whoever does it: part of the result
IN_FLIGHT = 2048  # requests at a vLLM engine, waiting ones included: enough that it never runs dry
ROW = "logprobs.json"  # in a model's folder: the trainer's log-probabilities of a row of tokens, to test the engine by
STOP = "\n\nQuestion:"  # where a base model that was shown examples begins to invent the next one
FLAG_TYPES = (bool, int, float, str, tuple)  # constants of these types have flags


# 2. Run: constants from the command line, a folder that remembers, phases that are made once --------------------------

def constants_of(script):
    """{name: (group, comment)} of the capital constants in a script's text; a group is the comment line above them."""
    found, group = {}, ""
    for line in Path(script).read_text().splitlines():
        if line.startswith("# "):
            group = line[2:].strip()
        constant = re.match(r"([A-Z][A-Z0-9_]*) = .*?(?:  # (.*))?$", line)
        if constant:
            found[constant[1]] = (group, constant[2] or "")
    return found


def override_from_cli(g):
    """Make a flag of every capital constant of a script and let the command line change them; `g` is its globals().

    Type from the default (an empty tuple takes texts, one or more), help from the comment behind it; where that begins
    with values in quotes ("a" | "b"), only those are legal. Numbers are finite and not negative, and 0 is legal where
    it is the default or the comment speaks of it. --toy applies the TOY dict first. A wrong flag ends the program with
    status 2 and one line."""
    script, flags = Path(g["__file__"]), []
    parser = argparse.ArgumentParser(prog=script.name, description=g["__doc__"], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(message):
        near = [n for w in re.findall(r"--[\w-]+", message) for n in difflib.get_close_matches(w, flags, 1) if n != w]
        fail(message + (f" (did you mean {near[0]}?)" if near else "") + "; --help lists all flags", status=2)

    end_on_signals()
    parser.error = error
    if "TOY" in g:
        parser.add_argument("--toy", action="store_true", help="laptop size: the values of TOY, then the other flags")
    for name, (_, comment) in constants_of(script).items():
        default, legal = g[name], re.match(r'("\w*"( \| )?)+', comment)
        if not isinstance(default, FLAG_TYPES):
            continue
        flags.append("--" + name.lower().replace("_", "-"))
        options = {"type": str}
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        elif default == ():
            options = {"nargs": "+"}
        elif not isinstance(default, str):
            options = {"type": functools.partial(_numbers, default, bool(re.search(r"(?<![.\d])0(?![.\d])", comment)))}
        if legal:
            options["choices"] = re.findall(r'"(\w*)"', legal[0])
        parser.add_argument(flags[-1], dest=name, default=argparse.SUPPRESS, **options,
                            help=f"{comment} [{default}]".replace("%", "%%"))
    given = vars(parser.parse_args())
    if given.pop("toy", False):
        g.update(g["TOY"])
    g.update(given)


def _numbers(default, zero, text):
    """The number or the tuple of numbers that `text` means, of the default's type and length."""
    old = default if isinstance(default, tuple) else (default,)
    try:
        new = tuple(type(o)(n) for o, n in zip(old, text.split(","), strict=True))
    except ValueError:
        what = {int: "whole number", float: "number"}[type(old[0])]
        raise argparse.ArgumentTypeError(f"not {f'a {what}' if len(old) == 1 else f'{len(old)} of them'}: {text!r}")
    if not all(math.isfinite(n) and (n > 0 or n == 0 and (zero or 0 in old or len(old) > 1)) for n in new):
        raise argparse.ArgumentTypeError(f"out of range: {text!r}")
    return new if isinstance(default, tuple) else new[0]


def end_on_signals():
    """Have Ctrl-C, and SIGTERM (of a cluster that wants its machine back, or of torchrun when another process has died)
    end the program at once and with one line, even while it waits in a library; and have it end when torchrun does."""
    ends, end = os.pipe()
    os.set_blocking(end, False)

    def wait():
        number = os.read(ends, 1)[0]
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print("\n" * sys.stderr.isatty() + f"{Path(sys.argv[0]).name}: stopped by {signal.Signals(number).name}; "
                  "what is finished stays, and the same command goes on from there", file=sys.__stderr__, flush=True)
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # else no number comes to `end`
    signal.set_wakeup_fd(end, warn_on_full_buffer=False)
    threading.Thread(target=wait, daemon=True).start()
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    def lost(kind, error, trace):
        if re.search("by peer|likely closed|remote process exited", str(error)):
            time.sleep(20)  # another process has died: torchrun says which, and ends this one before it says more
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = lost


def fail(message, status=1):
    """End the program with one line on standard error and a status that is not 0."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(5)  # the first process says it for all, unless this one alone has failed
    print(f"{Path(sys.argv[0]).name}: error: {printable(message)}", file=sys.stderr, flush=True)
    sys.exit(status)


def lines_of(error):
    """What an exception says, as lines; there is at least one."""
    return str(error).strip().splitlines() or [repr(error)]


def start_run(g, *problem_sets, models=()):
    """Join the other processes, open the run folder that a script's constants name, print the header; the Run.

    models: those beside MODEL that the results depend on. A folder that was made with other constants, problems or
    model files is refused, with the list of differences; the constants under "# Machine" and ROUNDS may differ. Changed
    source files are a warning."""
    script, about = Path(g["__file__"]), constants_of(g["__file__"])
    constants = json.loads(json.dumps({name: g[name] for name in about if isinstance(g[name], FLAG_TYPES)}))
    data = [seed_of(sorted(problem.items())) for problems in problem_sets for problem in problems]
    models = [fingerprint(local_folder(model)) for model in (*constants["MODEL"].split(","), *models)]
    grader = Path(constants["GRADER"].rpartition(":")[0])  # "." where there is none
    grader = grader.read_text() if grader.is_file() else ""
    constants["contents"] = f"{seed_of(data, *models, grader):x}"
    check_lengths(constants, list(itertools.chain(*problem_sets)))
    engine, why = engine_for(constants)
    name = constants["RUN"] or f"{script.stem}-{constants['SEED']}"
    check_name(name)
    wandb = None
    if constants["WANDB"]:
        try:
            import wandb
        except ImportError:
            fail("--wandb needs the package wandb: pip install wandb")
    setup()
    sources = [path.read_text() for path in (script, Path(__file__), Path(__file__).with_name("eval.py"))]
    refuse_differences({**constants, "source files": seed_of(*sources)})
    folder = Path("runs") / name
    lock, refused = lock_folder(folder) if rank() == 0 else (None, "")
    if refused := gather(refused)[0]:
        fail(refused)
    await_file(folder / "lock", gather((folder / "lock").read_text() if rank() == 0 else "")[0])
    old = read(folder / "constants.json")["constants"] if (folder / "constants.json").exists() else None
    if not any(folder.glob("*/")):
        old = None  # it was started, and nothing came of it: perhaps for a constant that is right now
    may_differ = {n for n, (group, _) in about.items() if group.startswith("Machine")} | {"ROUNDS"}
    if old:
        changed = [f"{n} {old.get(n, 'absent')!r} -> {constants.get(n, 'absent')!r}"
                   for n in sorted({*old, *constants} - may_differ) if old.get(n) != constants.get(n)]
        if changed:
            fail(f"{folder} was made with other constants ({'; '.join(changed)}); take another --run or the old values")
    elif any(folder.glob("*/")):  # a replay of recorded responses, or an accident
        say(f"warning: {folder} has results but no constants.json; they are taken as they are")
    texts = Counter(text for problems in problem_sets for text in {p["problem"] for p in problems})
    if twice := sum(n > 1 for n in texts.values()):
        say(f"warning: {twice:,} problems are in more than one of the sets (is something scored that is trained on?)")
    barrier()  # everybody has read what was there before rank 0 writes
    if rank() == 0:
        try:
            _describe(folder, script, constants, new=old is None)
        except OSError as error:
            fail(f"{folder}: {error.strerror}; start where runs/ can be written")
    barrier()
    gc.freeze()  # what is there now stays: a collection need not look through it
    atexit.register(gc.unfreeze)  # or libraries complain that they are not taken down
    say(f"{script.name} {'goes on' if old else 'starts'} in {folder}\n  model    {constants['MODEL']}\n"
        f"  machine  {world_size()} x {processor()}, {threads_per_process()} cores each\n"
        f"  sampler  {engine} ({why})\n  seed     {constants['SEED']}")
    return Run(folder, lock, constants, engine, wandb and rank() == 0 and wandb.init(name=name, config=constants))


def check_name(run):
    """End the program if this is no name for a folder under runs/."""
    if not re.fullmatch(r"\w[\w.-]{0,199}", run):
        fail(f"--run {run!r}: a run's name has up to 200 letters, digits, '.', '-' and '_'")


def refuse_differences(constants):
    """End the program if the processes were not all started alike: on several nodes somebody may have forgotten one."""
    (first, expected), *others = gather((platform.node(), constants))
    for number, (node, own) in enumerate(others, 1):
        differing = [f"{name.replace('contents', 'problems or models')} {own.get(name)!r}, not {value!r}"
                     for name, value in expected.items() if own.get(name) != value and name != "DATA"]
        if differing:
            fail(f"rank {number} on {node} has {'; '.join(differing)} as rank 0 on {first}: all nodes need the same "
                 "command, source files, problems and models")


def await_file(path, text="", seconds=120):
    """Return when this process sees what rank 0 has made, and that `text` is in it: a network's disk may remember for a
    minute what was there before. It ends the program if it stays unseen."""
    end = time.monotonic() + seconds
    while not path.exists() or text and path.read_text() != text:
        if time.monotonic() > end:
            fail(f"{path}: rank 0 has made it, and {platform.node()} does not see it; all nodes need the same runs/, "
                 "on a disk that they share")
        time.sleep(1)


def check_lengths(constants, problems):
    """End the program if a problem alone, with an answer, does not fit into a model's context: `sample` would find out,
    but perhaps hours later."""
    longest = max(problems, key=lambda p: len(p["problem"]), default=None)
    for model in map(local_folder, constants["MODEL"].split(",") if longest else ()):
        context, new = context_of(model), constants["MAX_NEW_TOKENS"]
        if len(longest["problem"]) + new > context:  # else it fits: a token is a character or more
            ids = AutoTokenizer.from_pretrained(model)(longest["problem"])["input_ids"]
            check_length(longest, len(ids), new, context)


def context_of(folder):
    """How many tokens the model in a folder can take."""
    return AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings


def check_length(problem, tokens, new, context):
    """End the program if a prompt of so many tokens, and as many new ones, do not fit into so many."""
    if tokens + new > context:
        fail(f"the prompt of {problem['id']} has {tokens:,} tokens; with {new} new ones it exceeds the context of "
             f"{context:,}; shorten either (--max-new-tokens, --shots)")


def lock_folder(folder):
    """Keep a run's folder to this program until it ends, however that comes: (what holds it, "") or (None, why not)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            return None, f"{folder} is in use by {lock.read().strip()}; wait for its end, or take another --run"
        except OSError:
            say(f"warning: the file system of {folder} has no locks; see to it that one program at a time works there")
        lock.truncate(0)
        print(f"process {os.getpid()} of {platform.node()}, since {time.ctime()}", file=lock, flush=True)
        os.fsync(lock.fileno())
        return lock, ""
    except OSError as error:
        return None, f"{folder}: {error.strerror}; start where runs/ can be written"


def fingerprint(model):
    """Something that changes when the weights in a folder do: sizes and both ends of its files."""
    digest = hashlib.sha256()
    for path in weight_files(model):
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size := path.stat().st_size) - min(size, 1 << 20))
            digest.update(file.read() + str(size).encode())
    return digest.hexdigest()


def engine_for(constants):
    """("vllm" or "transformers", why in a few words): what samples."""
    wanted, has_vllm = constants["ENGINE"], importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not has_vllm:
        fail("--engine vllm needs the package vllm: pip install -r requirements.txt")
    if wanted:
        return wanted, "asked for"
    if not torch.cuda.is_available():
        return "transformers", "no GPU"
    return ("vllm", "GPU") if has_vllm else ("transformers", "slow: pip install vllm")


def _describe(folder, script, constants, new):
    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).resolve()
    for source in {script.resolve(), here, here.with_name("eval.py")}:
        copy = folder / source.name
        if new or not copy.exists():
            shutil.copyfile(source, copy.with_suffix(".part"))
            copy.with_suffix(".part").rename(copy)
        elif copy.read_bytes() != source.read_bytes():
            say(f"warning: {source.name} has changed since {folder} was started")
    if new:
        shutil.rmtree(folder / "unfinished", ignore_errors=True)  # of a run with other constants, perhaps
        commit = subprocess.run("git rev-parse HEAD", cwd=script.resolve().parent, shell=True, capture_output=True)
        write(folder / "constants.json", {
            "constants": constants, "command": sys.argv, "git": commit.stdout.decode()[:40], "processes": world_size(),
            "machine": " ".join([*platform.uname()[:5], processor(), f"{os.cpu_count()} cores"]), "versions": {
                name: version(name) for name in ("torch", "transformers", "numpy", "math-verify",
                                                 *packages_distributions().get("vllm", ()))}})


class Run:
    """One folder runs/<name>: what was made stays made, so a rerun goes on after the last whole phase."""

    def __init__(self, folder, lock, constants, engine, wandb):
        self.folder, self.unfinished, self.lock, self.sampler = folder, folder / "unfinished", lock, None
        self.constants, self.seed, self.engine, self.wandb = constants, constants["SEED"], engine, wandb
        self.checker = Checker(min(8, threads_per_process()), constants["GRADER"])
        lines = read(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
        self.metrics = {(line["round"], line["phase"]): line for line in lines}
        resumed = self.metrics or self.unfinished.exists()
        self.began, self.logged = None if resumed else time.time(), set()  # of the round at work

    def once(self, name, make):
        """What runs/<run>/<name> holds, made first if it is not there.

        A name ending in .jsonl or .json: `make()` returns the records or the object (rank 0's counts). Any other name
        is a folder: `make(path)` fills it, and its path is returned. Half-made things have other names (.part)."""
        path, is_file = self.folder / name, name.endswith((".json", ".jsonl"))
        if not gather(rank() == 0 and path.exists())[0]:  # a network's disk remembers, for the others, what was missing
            try:
                self._make(path, make, is_file)
            except (OSError, SafetensorError, CheckpointException) as error:
                fail(f"{path} could not be made: {lines_of(error)[-1]}; what is finished stays, so mend that and run "
                     "the same command again")
            barrier()
        await_file(path)
        return read(path) if is_file else str(path)

    def _make(self, path, make, is_file):
        half = path.with_name(path.name + ".part")
        if is_file:
            made = make()
            if rank() == 0:
                write(path, made)
        else:
            if rank() == 0:
                shutil.rmtree(half, ignore_errors=True)
                half.mkdir(parents=True)
            barrier()
            make(half)
            if rank() == 0:
                for file in (*half.iterdir(), half):
                    flush(file)
                half.rename(path)
                flush(path.parent)
        if rank() == 0:
            shutil.rmtree(self.unfinished, ignore_errors=True)

    def rng(self, *key):
        """A numpy generator that depends on the seed and `key` (round, problem id, draw, ...) and on nothing else."""
        return np.random.default_rng(seed_of(self.seed, *key))

    def log(self, round, phase, **values):
        """Record the metrics of one phase of one round in metrics.jsonl; a phase made again replaces its line."""
        self.metrics[round, phase] = {"round": round, "phase": phase, **values}
        self.logged.add(phase)
        if rank() == 0:
            try:
                write(self.folder / "metrics.jsonl", self.metrics.values())
            except OSError as error:
                fail(f"{self.folder}/metrics.jsonl: {error.strerror}; mend that and run the same command again")
            if self.wandb:
                self.wandb.log({"round": round, **{f"{phase}/{name}": value for name, value in values.items()}})


def seed_of(*key):
    """A number below 2^63 from any key: the same on every machine, in every process (unlike hash())."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def read(path):
    """The records of a .jsonl file, or the object of a .json file."""
    with open(path) as file:
        try:
            return [json.loads(line) for line in file] if path.suffix == ".jsonl" else json.load(file)
        except ValueError as error:
            after = " and what was made after it" if path.parent.name.startswith("round_") else ""
            fail(f"{path} is damaged ({error}); remove it{after}, then run the same command again")


def write(path, value):
    """Write what `read` reads, under another name, flushed, then renamed: a file is whole or not there."""
    half = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(half, "w") as file:
        lines = map(json.dumps, value) if path.suffix == ".jsonl" else [json.dumps(value, indent=1)]
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    half.rename(path)
    flush(path.parent)


@contextlib.contextmanager
def at_once():
    """For a function on millions of records: without Python's garbage collector, which would look through them again
    and again (half of the time), and find nothing."""
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@at_once()
def by_problem(records):
    """{id: its records, in order}."""
    groups = defaultdict(list)
    for record in records:
        groups[record["id"]].append(record)
    return groups


def outcomes_of(responses):
    """One problem's draws as numbers: 1 is correct, 0 wrong, -1 cut by the length limit."""
    return [int(r["correct"]) if r["finish"] == "stop" else -1 for r in responses]


def mean_of(numbers):
    """Their mean, rounded once, at the end: three times 0.65 is 0.65. As statistics.mean, and five times as fast."""
    ratios = [number.as_integer_ratio() for number in numbers]
    scale = max(below for _, below in ratios)  # a multiple of the others: they are powers of two
    return sum(above * (scale // below) for above, below in ratios) / (scale * len(ratios))


def spread_evenly(total, n, rng):
    """`total` spread over n places as evenly as can be: a list of n numbers; the remainder goes to random ones."""
    counts = [total // n] * n
    for i in rng.permutation(n)[:total % n]:
        counts[i] += 1
    return counts


def apportion(shares, room, total):
    """`total` divided among places (n,) in proportion to their shares, but to none more than it has room for; what one
    cannot take goes to the others, in proportion to theirs. Made whole by the largest remainders (of equals the first).
    A place without a share gets nothing, even if so less than `total` is given."""
    free, counts = (shares > 0) & (room > 0), np.zeros(len(room), dtype=int)
    total = min(total, room[free].sum())
    while free.any():
        parts = np.where(free, (total - counts.sum()) * shares / shares[free].sum(), 0)
        full = free & (parts >= room)
        if not full.any():
            counts[free] = np.floor(parts[free] + 1e-9)
            remainders = np.where(free, parts - counts, -np.inf)
            counts[np.argsort(-remainders, kind="stable")[:total - counts.sum()]] += 1
            break
        counts[full], free = room[full], free & ~full
    return counts


def flush(path):
    """Have what was written to a file or folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# 3. Processes: the same under torchrun and plain python ---------------------------------------------------------------

_shared = None  # a key-value store that all processes see
_counters = itertools.count()  # in it: all processes open them in the same order
STARTS = "TIMES_STARTED_AGAIN"  # environment variable: how often `start_again` was called
ENGINE_FAILED = "ENGINE_FAILED"  # environment variable: the phase in which it was called for that


def setup():
    """Join the process group: torchrun's where there is one, else a group of this process alone."""
    global _shared
    if dist.is_initialized():
        return
    if "RANK" in os.environ:
        store, my_rank, size = next(dist.rendezvous("env://"))
        _shared = dist.PrefixStore(os.environ.get(STARTS, "0"), store)
    else:
        _shared, my_rank, size = dist.TCPStore("localhost", 0, 1, True), 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    try:  # A barrier may wait through a whole sampling phase; torchrun, not a timeout, notices a dead process.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", rank=my_rank,
                                world_size=size, store=dist.PrefixStore("group", _shared), timeout=timedelta(days=7))
    except RuntimeError as error:
        fail(f"{platform.node()}: the processes cannot reach one another ({lines_of(error)[0]}); on several nodes "
             "GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) may have to name the network interface that joins them")


def give_memory_back():
    """What nothing uses any more to the system: of Python (the pieces of a graph refer to one another), of the C
    library (which keeps some for each thread, and more with each phase) and of the GPU."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    if device().type == "cuda":
        torch.cuda.empty_cache()


def start_again(environment):
    """Begin this program anew, in the place of this process: what is finished, it finds in its run folder."""
    barrier()
    sys.stdout.flush()
    starts = 1 + int(environment.get(STARTS, "0"))  # torchrun's store still has what the processes have said
    if starts > 99:
        fail("started again 99 times, which is no progress any more")
    os.execve(sys.executable, [sys.executable, *sys.argv], environment | {STARTS: str(starts)})


def device():
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def processor():
    """What computes, by name."""
    return torch.cuda.get_device_name() if device().type == "cuda" else "CPU"


def threads_per_process():
    """Cores that one process may use: threads beyond the cores spin against each other (60 times slower, measured)."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def say(text=""):
    """Print, on rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(printable(text), flush=True)


def printable(text):
    """A text as a terminal may have it: control characters, with which a model's could move the cursor or worse, and
    what the terminal's encoding lacks are written as escapes."""
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
                  lambda m: m[0].encode("unicode_escape").decode(), text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def claims(n):
    """Those of the numbers below n that this process gets: each goes to whoever asks next, so nobody waits for work."""
    counter = f"claims/{next(_counters)}"
    while (number := _shared.add(counter, 1) - 1) < n:
        yield number


class Log:
    """Entries (plain data) that any process appends and all read, in one order."""

    def __init__(self):
        self.name, self.seen = f"log/{next(_counters)}", 0

    def append(self, entry):
        _shared.set(f"{self.name}/{_shared.add(self.name, 1)}", json.dumps(entry))

    def any(self):
        """Whether there are entries."""
        return _shared.add(self.name, 0) > 0

    def new(self):
        """The entries since the last time."""
        while self.seen < _shared.add(self.name, 0):
            self.seen += 1
            yield json.loads(_shared.get(f"{self.name}/{self.seen}"))


def barrier():
    dist.all_reduce(torch.zeros(1))  # a CPU tensor: gloo waits without spinning, whatever the devices are


def gather(item):
    """Everybody's `item`, on everybody: a list in rank order."""
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def bar(total, what):
    """A progress bar on rank 0; silent where standard error is not a terminal."""
    return tqdm(total=total, desc=what, disable=rank() != 0 or not sys.stderr.isatty(), leave=False, dynamic_ncols=True)


# 4. Problems and prompts ----------------------------------------------------------------------------------------------

SETS = {  # name: {split: its file in the DATA folder, and where the Hub has it: owner/name:configuration@split}
    "gsm8k": {"train": "gsm8k/train.jsonl openai/gsm8k:main@train", "test": "gsm8k/test.jsonl openai/gsm8k:main@test"},
    "math": {"train": "math/train.jsonl DigitalLearningGmbH/MATH-lighteval@train",
             "test": "math/test.jsonl DigitalLearningGmbH/MATH-lighteval@test"},
    "math500": {"test": "math500/test.jsonl HuggingFaceH4/MATH-500@test"},
    "aime24": {"test": "aime24/test.jsonl HuggingFaceH4/aime_2024@train"},
    "aime25": {"test": "aime25/test.jsonl math-ai/aime25@test"},
    "aime_1983_2023": {"train": "aime_1983_2023/train.jsonl"},
    "amc23": {"test": "amc23/test.jsonl math-ai/amc23@test"},
    "olympiadbench": {"test": "olympiadbench/test.jsonl Hothan/OlympiadBench:OE_TO_maths_en_COMP@train"},
    "minerva_math": {"test": "minerva_math/test.jsonl math-ai/minervamath@test"},
    "college_math": {"test": "college_math/test.jsonl di-zhang-fdu/College_Math_Test@test"},
    "gaokao2023en": {"test": "gaokao2023en/test.jsonl MARIO-Math-Reasoning/Gaokao2023-Math-En@train"},
    "theoremqa": {"test": "theoremqa/test.jsonl TIGER-Lab/TheoremQA@test"},
    "tal_scq": {"train": "tal_scq5k/en_train.jsonl", "test": "tal_scq5k/en_test.jsonl"},
    "svamp": {"train": "svamp/train.jsonl ChilleD/SVAMP@train", "test": "svamp/test.jsonl ChilleD/SVAMP@test"},
    "adastar_svamp": {"train": "adastar_svamp/train.jsonl", "test": "adastar_svamp/test.jsonl"},
    "adastar_gsm8k": {"test": "adastar_gsm8k/test.jsonl"},
    "arc_challenge": {"train": "arc_challenge/train.jsonl allenai/ai2_arc:ARC-Challenge@train",
                      "test": "arc_challenge/test.jsonl allenai/ai2_arc:ARC-Challenge@test"},
    "commonsenseqa": {"train": "commonsenseqa/train_rand_split.jsonl tau/commonsense_qa@train",
                      "test": "commonsenseqa/dev_rand_split.jsonl tau/commonsense_qa@validation"},
    "anli_r1": {"train": "anli_r1/train_r1.jsonl facebook/anli@train_r1",
                "test": "anli_r1/test_r1.jsonl facebook/anli@test_r1"},
    "adastar_arc": {"train": "arc_challenge/train_val_combined.jsonl", "test": "arc_challenge/test_new.jsonl"},
    "cladder": {"train": "cladder/cladder_train.jsonl",
                "test": "cladder/cladder_test.jsonl causal-nlp/CLadder@full_v1.5_default"},
}
FIELDS = {  # the names that the sets give to the parts of a problem; the first that is there counts
    "problem": ("problem", "question_concat", "question", "Question", "prompt"),
    "answer": ("answer", "expected_answer", "final_answer", "Answer", "answerKey", "answer_value", "label"),
    "solution": ("solution", "reference_solution", "reasoning", "answer_analysis"),
    "level": ("level", "difficulty"),
    "tags": ("tags", "subject", "type", "Type", "subfield", "data_topic", "knowledge_point_routes", "query_type"),
}
ENTAILMENT = ("entailment", "neutral", "contradiction")  # of the labels 0, 1, 2


def load_problems(names, split, folder, limit=0):
    """The problems of sets ("gsm8k,math", "my/file.jsonl"), in order; of each `limit` random but fixed ones (0: all).

    A name of SETS is read from `folder` if its file is there, else from the Hub; "owner/name:configuration@split" is
    a set of the Hub (this needs the package datasets). `read_problem` says what a record has. One that cannot be used
    ends the program with file, line and reason; an empty answer drops the record, counted and said."""
    problems = []
    for name in filter(None, names.split(",")):
        path, hub, where = Path(name), name, name
        if name in SETS:
            if split not in SETS[name]:
                fail(f"{name} has no {split} split, only {', '.join(SETS[name])}")
            file, _, hub = SETS[name][split].partition(" ")
            path, where = Path(folder) / file, f"{name}/{split}"
        elif not re.fullmatch(r".*\.jsonl?|[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w.-]+)?", name):
            fail(f"unknown problem set {name!r}; known are {', '.join(SETS)}, paths that end in .jsonl or .json, and "
                 "owner/name:configuration@split on the Hub")
        if path.is_file():
            where, records = path, _records_of_file(path)
            ids = f"{path.resolve().parent.name}/{path.stem}"
        elif name in SETS or not name.endswith((".jsonl", ".json")):
            hint = f"{path}: no such file (--data names the folder that has it); " if name in SETS else ""
            ids = where if name in SETS else re.sub(r"[:@]", "/", name if "@" in name else f"{name}@{split}")
            records = _records_of_hub(hub, split, hint)
        else:
            fail(f"{path}: no such file")
        found = _read_set(where, records, ids)
        problems += [found[i] for i in sorted(np.random.default_rng(0).permutation(len(found))[:limit or None])]
    if not problems:
        fail(f"no problem set is named ({names!r})")
    twice = [i for i, n in Counter(p["id"] for p in problems).items() if n > 1]
    if twice:
        fail(f"two problems have the id {twice[0]!r} (of {len(twice)}); rename one of the files or folders")
    return problems


def _records_of_file(path):
    """(number, record) of a .jsonl file's lines, or of the list that a .json file is (or has under "data")."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # `_read_set` names the line
            if path.suffix == ".jsonl":
                yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
                return
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except (ValueError, RecursionError) as error:
        fail(f"{path}: not valid JSON ({lines_of(error)[0]})")
    records = records.get("data") if isinstance(records, dict) else records
    if not isinstance(records, list):
        fail(f"{path}: neither a list of problems nor an object with one under 'data'")
    yield from enumerate(records, 1)


def _records_of_hub(name, split, hint):
    if not name:
        fail(f"{hint}the Hub does not have it in a form that is read here")
    try:
        from datasets import load_dataset
    except ImportError:
        fail(f"{hint}to get {name} from the Hub: pip install datasets")
    repository, _, of = name.partition("@")
    repository, _, configuration = repository.partition(":")
    try:
        return enumerate(load_dataset(repository, configuration or None, split=of or split), 1)
    except Exception as error:  # no network, no such name: many kinds
        fail(f"{hint}{name} is not to be had from the Hub: {lines_of(error)[0]}")


def _read_set(where, records, ids):
    problems, empty = [], 0
    for number, record in records:
        try:
            if isinstance(record, str):
                record.encode()
            problem = read_problem(json.loads(record) if isinstance(record, str) else record)
        except (ValueError, RecursionError) as error:
            reason = ("not valid JSON" if isinstance(error, (json.JSONDecodeError, RecursionError)) else
                      "not UTF-8" if isinstance(error, UnicodeError) else str(error)[:200])
            fail(f"{where}:{number}: {reason}; mend or remove it")
        if problem is None:
            empty += 1
        else:
            problems.append({"id": f"{ids}/{number}", **problem})
    if empty:
        say(f"{where}: {empty} problem{'s' * (empty > 1)} with an empty answer dropped")
    if not problems:
        fail(f"{where}: no problem in it")
    return problems


def read_problem(record):
    """One source record as a problem without its id; None if its answer is empty; ValueError if it cannot be used.

    FIELDS has the names that are looked for. An answer may be a number, stand behind "####" (GSM8K) or, where there
    is none, in the last box of the solution (MATH). With `choices` the problem ends in lettered options, and the
    answer is a letter. `kind` may be given; else it is told from the answer."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    text, answer, solution, level, tags = (next((record[n] for n in names if n in record), None)
                                           for names in FIELDS.values())
    solution = "\n\n".join(map(str, solution)) if isinstance(solution, list) else solution
    if not isinstance(solution, (str, type(None))):
        raise ValueError("'solution' is neither a text nor a list of texts")
    choices, kind = record.get("choices") or record.get("answer_option_list"), record.get("kind")
    if isinstance(text, dict):  # CommonsenseQA
        text, choices = text.get("stem"), text.get("choices")
    elif isinstance(record.get("Body"), str) and "question_concat" not in record:  # SVAMP
        text = f"{record['Body']} {text}"
    elif "premise" in record and "hypothesis" in record:  # ANLI
        text = (f"Premise: {record['premise']}\nHypothesis: {record['hypothesis']}\nDoes the premise entail the "
                "hypothesis? Answer entailment, neutral or contradiction.")
        answer = ENTAILMENT[int(answer)] if str(answer) in ("0", "1", "2") else answer
        kind, choices = "label", list(ENTAILMENT)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"no text under {' or '.join(map(repr, FIELDS['problem'][:3:2]))}")
    answer, solution = _answer_and_solution(answer, solution)
    if not answer:
        return None
    problem = {"problem": text.strip(), "answer": answer, "kind": kind or _kind_of(answer, choices, record)}
    if problem["kind"] not in ("math", "choice", "label", "yesno"):
        raise ValueError(f"'kind' is {kind!r}, and not math, choice, label or yesno")
    if choices:
        _add_choices(problem, choices)
    if isinstance(solution, str) and solution.strip():
        boxed = "" if last_boxed(solution) else f"\n\n\\boxed{{{problem['answer']}}}"  # what is learnt gives its answer
        problem["solution"] = solution.strip() + boxed
    level = re.search(r"\d+", str(level))
    if level:
        problem["level"] = int(level[0])
    if tags:
        problem["tags"] = list(map(str, tags)) if isinstance(tags, list) else [str(tags)]
    texts = text, answer, problem.get("solution", ""), *problem.get("choices", ()), *problem.get("tags", ())
    if re.search("[\ud800-\udfff]", "".join(texts)):
        raise ValueError("half a character, \\ud800 or the like")
    return problem


def _answer_and_solution(answer, solution):
    """The answer as text, and the solution, which may stand before the answer."""
    if isinstance(answer, list):  # OlympiadBench: a list of one; TheoremQA: numbers
        answer = answer[0] if len(answer) == 1 and isinstance(answer[0], str) else str(answer)
    elif isinstance(answer, float) and math.isfinite(answer):
        answer = np.format_float_positional(answer, trim="-")
    elif isinstance(answer, int):
        answer = str(answer)
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
    if not isinstance(answer, str):
        raise ValueError("no 'answer', nor a \\boxed{} in 'solution'")
    if "####" in answer:  # GSM8K: one step a line with <<calculator notes>>, and the answer
        steps, answer = answer.rsplit("####", 1)
        solution = re.sub(r"<<.*?>>", "", steps).strip().replace("\n", "\n\n")
    return answer.strip(), solution


def _kind_of(answer, choices, record):
    if choices or record.get("Answer_type") == "option":
        return "choice"
    return "yesno" if answer.casefold() in ("yes", "no", "true", "false") else "math"


def _add_choices(problem, choices):
    """Put the options of a problem below its text, lettered from A, and have its answer name one of them."""
    if isinstance(choices, dict) and not {"text", "label"} <= {*choices}:  # {"A": "a cat", "B": "a dog"}
        choices = {"label": list(choices), "text": list(choices.values())}
    if isinstance(choices, dict) and all(isinstance(choices[name], list) for name in ("text", "label")):
        choices = [{"text": t, "label": n} for t, n in zip(choices["text"], choices["label"])]
    if not isinstance(choices, list):
        raise ValueError("'choices' is not a list of at most 26 texts")
    choices = [c[0] if isinstance(c, list) and len(c) == 1 else c for c in choices]
    texts = [c.get("text", c.get("content")) if isinstance(c, dict) else c for c in choices]
    if not all(isinstance(text, str) for text in texts) or len(texts) > 26:
        raise ValueError("'choices' is not a list of at most 26 texts")
    texts, answer = [text.strip() for text in texts], problem["answer"]
    if problem["kind"] == "label":
        if answer not in texts:
            raise ValueError(f"the answer {answer!r} is none of the choices")
    else:
        labels = [str(c.get("label", c.get("aoVal"))).upper() if isinstance(c, dict) else chr(65 + i)
                  for i, c in enumerate(choices)]
        place = labels.index(answer.upper()) if answer.upper() in labels else texts.index(answer) if answer in texts \
            else None
        if place is None:
            raise ValueError(f"the answer {answer!r} is none of the choices")
        problem["answer"] = chr(65 + place)
        problem["problem"] += "".join(f"\n({chr(65 + i)}) {text}" for i, text in enumerate(texts))
    problem["choices"] = texts


def load_network(kind, folder, **options):
    """The model in a folder, as transformers has it; ends the program where tensors are missing or have other shapes:
    those would be random, silently."""
    try:
        network, about = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True,
                                              ignore_mismatched_sizes=True, **options)
    except Exception as error:  # files of any content are read here, by a library
        fail(f"{folder}: {' '.join(lines_of(error))[:300]}")
    for name, found, wanted in about["mismatched_keys"]:
        fail(f"{folder}: {name} has the shape {tuple(found)}, where config.json wants {tuple(wanted)}")
    if missing := [name for name in sorted(about["missing_keys"]) if "pooler." not in name]:  # which nothing here uses
        fail(f"{folder}: {missing[0]} is missing, and {len(missing) - 1} more tensors of a {network.config.model_type}")
    return network


@functools.cache  # what the Hub has under a name may change; a run stays with what it began with
def local_folder(model):
    """The folder of a model: itself, or where the files of that name on the Hub lie, downloaded if need be."""
    if Path(model).is_dir():
        return str(model)
    try:
        return snapshot_download(model, allow_patterns=["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"])
    except Exception as error:  # no network, no such name, no leave: the Hub's client raises many kinds
        fail(f"{model}: no such folder here, and not to be had from the Hub: {lines_of(error)[0]}")


def weight_files(folder):
    """The safetensors files of a model, as its index says where it has one: a folder may hold the weights twice."""
    index = Path(folder) / "model.safetensors.index.json"
    if index.exists():
        return [Path(folder) / name for name in sorted(set(read(index)["weight_map"].values()))]
    return sorted(Path(folder).glob("*.safetensors"))


def check_weights(folder):
    """End the program unless the safetensors files of a model are all there and whole (by their headers)."""
    paths = weight_files(folder)
    if not paths:
        fail(f"{folder}: no *.safetensors in it (weights in other formats can run code, and are not read)")
    for path in paths:
        try:
            safe_open(path, "pt").__enter__()
        except (OSError, SafetensorError) as error:
            fail(f"{path} is damaged or missing ({lines_of(error)[0]}); bring it again, or remove the folder "
                 "if a run made it, and what was made after it")


def load_tokenizer(model, prompt, system=""):
    """The model's tokenizer; ends the program where its files are missing, or it cannot make prompts of this form."""
    folder = local_folder(model)
    check_weights(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # code that a folder brings is never run
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer("1 + 1", add_special_tokens=False)["input_ids"]:
            raise ValueError("there is no tokenizer in it")
        size, room = max(tokenizer.get_vocab().values()) + 1, config.get_text_config().vocab_size
        if size > room:
            raise ValueError(f"its tokenizer has {size:,} tokens, and the model only {room:,}")
        if prompt and not tokenizer.eos_token:
            raise ValueError("its tokenizer has no end token (eos_token in tokenizer_config.json)")
        if prompt == "chat" and tokenizer.chat_template:
            end_token(tokenizer, prompt)
    except Exception as error:  # files of any content are read here, by libraries
        own = "custom code" in str(error)
        fail(f"{model}: {'it brings code of its own, which is never run here' if own else lines_of(error)[0]}")
    if prompt == "chat" and not tokenizer.chat_template:
        fail(f"{model} has no chat template; take --prompt few_shot or zero_shot")
    if prompt == "chat":
        make_prompt(tokenizer, prompt, {"problem": "?"}, [{"problem": "?", "solution": "!"}], system)
    return tokenizer


_tokenizers = {}  # by what is in their folders


def tokenizer_to_read(folder):
    """The tokenizer in a folder, to pad on the left. Equal ones are one: each that has encoded anything keeps 12 kB for
    good (measured), and the model of each round brings its own."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix in (".json", ".jinja", ".model", ".txt") and path.name != ROW:
            digest.update(path.name.encode() + path.read_bytes())
    key = digest.hexdigest()
    if key not in _tokenizers:
        _tokenizers[key] = AutoTokenizer.from_pretrained(folder, padding_side="left")
        _tokenizers[key].pad_token = _tokenizers[key].pad_token or _tokenizers[key].eos_token
    return _tokenizers[key]


def make_prompt(tokenizer, prompt, problem, examples=(), system=""):
    """The text to be continued: plain with `examples` before it ("few_shot", "zero_shot") or turns of a "chat"."""
    if prompt == "chat":
        turns = [{"role": "system", "content": system}] if system else []
        for example in examples:
            turns += [{"role": "user", "content": example["problem"]},
                      {"role": "assistant", "content": example["solution"]}]
        turns.append({"role": "user", "content": problem["problem"]})
        try:
            return chat_text(tokenizer, turns, add_generation_prompt=True)
        except ValueError as error:
            fail(f"{tokenizer.name_or_path}: {error}")
    shots = "".join(f"Question: {e['problem']}\nAnswer:\n{e['solution']}\n\n" for e in examples)
    return f"{shots}Question: {problem['problem']}\nAnswer:\n"


def chat_text(tokenizer, turns, **options):
    """Turns of a conversation as the model's chat template has them; ValueError where that cannot."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # a template is a program, though in a sandbox
        without = "; --system '' leaves the system's turn out" if turns[0]["role"] == "system" else ""
        raise ValueError("its chat template fails for turns of " + ", ".join(turn["role"] for turn in turns)
                         + f" ({lines_of(error)[-1]}){without}")


def end_token(tokenizer, prompt):
    """The token that ends an answer: under "chat" what the template puts behind a turn, else end of text."""
    if prompt != "chat":
        return tokenizer.eos_token
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!!"}]
    behind = chat_text(tokenizer, turns).rpartition("!!")[2]
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    special = [i for i in ids if i in tokenizer.all_special_ids]
    return tokenizer.convert_ids_to_tokens(special[0]) if special else tokenizer.eos_token


def end_ids(tokenizer, folder):
    """Ids of all tokens that end an answer: a tuned model may end either way, whatever the form of the prompt."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        with contextlib.suppress(ValueError):  # a template that wants other turns, and is not used
            ends.add(tokenizer.convert_tokens_to_ids(end_token(tokenizer, "chat")))
    path = Path(folder) / "generation_config.json"
    named = read(path).get("eos_token_id") if path.exists() else None
    return sorted(ends.union(named if isinstance(named, list) else [named]) - {None})


def make_example(tokenizer, prompt, problem, *completions, system=""):
    """A training example: the zero-shot form of the problem, and what is to be learnt from it."""
    return {"id": problem["id"], "prompt": make_prompt(tokenizer, prompt, problem, system=system),
            "completions": list(completions), "end": end_token(tokenizer, prompt)}


def encode(tokenizer, text):
    """Token ids of a prompt; a beginning-of-text token is added only where the text (a chat) does not bring its own."""
    brings_its_own = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not brings_its_own)["input_ids"]


# 5. Sampling: requests in, checked responses out ----------------------------------------------------------------------

def sample(run, model, problems, draws, prompt, *, round, phase, enough=None, walk=None, check=None, **settings):
    """Draw answers with the model in folder `model` and check them: responses in the order of problems, then of draws.

    draws: how many per problem (a number, or a list parallel to problems). prompt(problem, draw): the text to continue.
    enough(responses): asked after each draw with those of the problem so far; once true, later draws are not recorded
    (what they cost counts as "spent" in the metrics). walk: problems are taken in order, and recorded up to an end that
    it finds on the way (adastar.Walk shows what it needs: take, exchange, over, end, goal, total). check(response): for
    output that is no answer, whether it is usable; called in this process. settings: style (the form of the prompts),
    temperature (0 is greedy), max_new_tokens, and where wanted top_p, top_k.
    The recorded responses depend on the seed, the round and the requests, not on the number of processes."""
    sampler = run.sampler = run.sampler or (VllmSampler if run.engine == "vllm" else Sampler)(run)
    model = local_folder(model)
    check_weights(model)
    sampler.read_tokenizer(model, **settings)
    longest = sorted(problems, key=lambda p: -len(p["problem"]))[:GROUP]  # the others when their turn comes
    longest = [(p, max(prompt(p, 0), prompt(p, int(np.max(draws)) - 1), key=len)) for p in longest]
    for problem, text in longest:
        sampler.prompt_ids(problem, text)
    give_memory_back()  # what training had
    loading = sampler.load(model)
    for problem, text in longest:  # once more: an engine may have room for less than the model could take
        sampler.prompt_ids(problem, text)
    work = Draws(run, problems, draws, prompt, enough, round, phase, walk, check)
    with bar(walk.goal if walk else sum(work.draws), f"round {round} {phase}") as work.progress:
        work.progress.update(walk.total if walk else len(work.answers))
        sampler.answer(work)
    work.file.close()
    del work.recorded[walk.end if walk else len(problems):]
    costs, seconds = work.costs(sampler.parameters), time.time() - work.began
    run.log(round, phase, **costs, **loading, seconds=seconds)
    say(f"  round {round}  {phase:<9} {costs['draws']:>7,} answers of {costs['spent_draws']:,} drawn, "
        f"{costs['correct'] / max(1, costs['draws']):.1%} {'usable' if check else 'correct'}, "
        f"{costs['spent_tokens'] / seconds:,.0f} tok/s, "
        f"{seconds:.1f} s")
    odd = [f"{reason} {costs[f'check_{reason}']:,}" for reason in NO_VERDICT if costs[f"check_{reason}"]]
    if odd:
        say(f"           counted as wrong without a comparison: {', '.join(odd)}")
    return [{key: answer[key] for key in ("id", "draw", "text", "tokens", "finish", "correct")}
            for recorded in work.recorded for answer in recorded]


class Draws:
    """The draws of one sampling phase: which are due, which are answered, which of them count.

    With `enough`, a problem's draws come in waves [0], [1], [2, 3], [4..7], ..., since most are not needed; else all at
    once. Answers are kept in unfinished/ when their verdict is known, so that a killed phase goes on from there."""

    def __init__(self, run, problems, draws, prompt, enough, round, phase, walk, usable):
        self.problems, self.enough, self.checker, self.walk, self.usable = problems, enough, run.checker, walk, usable
        self.phase = f"round {round} {phase}"
        self.prompt = lambda i, d: (problems[i], prompt(problems[i], d))
        self.draws = [draws] * len(problems) if isinstance(draws, int) else draws
        self.seed = lambda i, d: seed_of(run.seed, round, phase, problems[i]["id"], d)
        self.recorded, self.done = [[] for _ in problems], [n == 0 for n in self.draws]
        self.answers, self.mine, self.pending, self.right, self.settled = {}, [], [], 0, 0
        self.cancelled = Counter(cancelled=0, tokens=0, prompt_tokens=0)
        self.checker.verdicts.clear()
        self.place, self.began = {p["id"]: i for i, p in enumerate(problems)}, time.time()
        name = f"round_{round}-{phase}@{{}}.jsonl"
        for path in sorted(run.unfinished.glob(name.format("*"))):
            for line in open(path, errors="replace"):
                with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that a kill cut short
                    answer = json.loads(line)
                    self.put(answer)
                    self.began = min(self.began, time.time() - answer["at"])
        if walk and rank() == 0:
            walk.exchange({i: self.recorded[i] for i, done in enumerate(self.done) if done})
        barrier()  # everybody has read before anybody writes on
        run.unfinished.mkdir(parents=True, exist_ok=True)
        self.file = open(run.unfinished / name.format(rank()), "a")
        self.file.write("\n")  # behind such a line

    def wave(self, i, number):
        """The draws of problem i in a wave: a range, empty where it has enough before it."""
        start, end = ((1 << number) >> 1, 1 << number) if self.enough else (0, self.draws[i]) if number == 0 else (0, 0)
        over = self.done[i] and len(self.recorded[i]) <= start
        return range(0) if over else range(start, min(end, self.draws[i]))

    def check(self, i, draw, prompt_tokens, tokens, text, finish):
        """Take in an answer and hand it to the checker; `settle` will record it."""
        answer = {"id": self.problems[i]["id"], "draw": draw, "text": text, "tokens": tokens, "finish": finish,
                  "prompt_tokens": prompt_tokens}
        if self.usable:
            verdict = Future()
            verdict.set_result((True, "usable") if self.usable(answer) else (False, "unusable"))
        else:
            verdict = self.checker.submit(self.problems[i], text)
        self.pending.append((answer, verdict))

    def settle(self, wait=False):
        """Record the answers whose verdicts are there (or, to wait, all): [(problem's place, draw)]."""
        settled, waiting = [], []
        for answer, verdict in self.pending:
            if wait or verdict.done():
                answer["correct"], answer["reason"] = verdict.result()
                answer["at"] = round(time.time() - self.began, 3)
                self.file.write(json.dumps(answer) + "\n")
                self.mine.append(answer)
                settled.append(self.put(answer))
            else:
                waiting.append((answer, verdict))
        self.pending = waiting
        self.file.flush()
        self.right += sum(self.answers[request]["correct"] for request in settled)
        self.settled += len(settled)
        what = "usable" if self.usable else "correct"
        self.progress.set_postfix_str(f"{self.right / max(1, self.settled):.1%} {what}", refresh=False)
        if self.walk:
            self.walk.exchange({i: self.recorded[i] for i, _ in settled if self.done[i]})
        more = len(settled) * world_size()  # the others are about as far
        self.progress.update(self.walk.total - self.progress.n if self.walk else more)
        return settled

    def put(self, answer):
        """Take in a checked answer; those of its problem count in the order of the draws, until they are enough."""
        i = self.place[answer["id"]]
        self.answers.setdefault((i, answer["draw"]), answer)
        while not self.done[i] and (i, len(self.recorded[i])) in self.answers:
            self.recorded[i].append(self.answers[i, len(self.recorded[i])])
            enough = self.enough is not None and self.enough(self.recorded[i])
            self.done[i] = enough or len(self.recorded[i]) == self.draws[i]
        return i, answer["draw"]

    def exchange(self):
        """Wait for the verdicts; then every process knows every process' answers."""
        self.settle(wait=True)
        for part in gather(self.mine):
            for answer in part:
                self.put(answer)
        self.mine = []

    def costs(self, parameters):
        """Counts of the recorded draws, what was spent on all of them, and FLOPs (2 N a token) of both. Padded: with
        each prompt as long as the longest, as implementations that pad, and AdaSTaR's tables, count."""
        costs, longest = Counter(draws=0, correct=0), 0
        for answer in [*self.answers.values(), *gather(self.cancelled)]:
            costs.update(spent_draws=answer.get("cancelled", 1), spent_tokens=answer["tokens"],
                         spent_prompt_tokens=answer["prompt_tokens"])
        for answer in itertools.chain(*self.recorded):
            longest = max(longest, answer["prompt_tokens"])
            costs.update({"draws": 1, "tokens": answer["tokens"], "prompt_tokens": answer["prompt_tokens"],
                          "correct": int(answer["correct"]), "cut": int(answer["finish"] == "length"),
                          f"check_{answer['reason']}": 1})
        costs.update(flops=2 * parameters * (costs["prompt_tokens"] + costs["tokens"]),
                     padded_flops=2 * parameters * (longest * costs["draws"] + costs["tokens"]),
                     spent_flops=2 * parameters * (costs["spent_prompt_tokens"] + costs["spent_tokens"]))
        return costs


class Sampler:
    """transformers.generate over fixed groups of requests. A group is always one batch, with one thread on CPU,
    whichever process takes it: the same row in another batch differs by 1e-6 in the logits, which may flip a token."""

    def __init__(self, run):
        self.folder = self.model = None
        self.cores = 1 if device().type == "cuda" else threads_per_process()  # groups that are generated side by side
        self.engine_context = math.inf  # tokens of a request that the engine has room for, if less than the model's

    def read_tokenizer(self, folder, style, max_new_tokens, **sampling):
        """Prepare for a phase with these settings: what both engines share."""
        self.tokenizer = tokenizer_to_read(folder)
        self.encode = functools.lru_cache(256)(functools.partial(encode, self.tokenizer))  # draws share their prompt
        self.ends = end_ids(self.tokenizer, folder)
        self.stops = [] if style == "chat" else [STOP]
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.context = context_of(folder)

    def prompt_ids(self, problem, text):
        """Token ids of a prompt; ends the program if they and an answer do not fit into the model's context."""
        ids = self.encode(text)
        check_length(problem, len(ids), self.max_new_tokens, min(self.context, self.engine_context))
        return ids

    def load(self, folder):
        """Answer with the model in `folder` from now on; the seconds it took, for the metrics."""
        if folder == self.folder and self.model is not None:
            return {}
        began = time.time()
        self.model = load_network(AutoModelForCausalLM, folder, dtype=compute_dtype()).to(device()).eval()
        if odd := [name for name, tensor in self.model.named_parameters() if not tensor.isfinite().all()]:
            fail(f"{folder}: {odd[0]} is not finite (nor are {len(odd) - 1} more)")
        self.model.generation_config = GenerationConfig()  # a folder may bring a repetition penalty and the like
        self.folder, self.parameters = folder, sum(p.numel() for p in self.model.parameters())
        return {"load_seconds": time.time() - began}

    def sleep(self):
        """Give the model's memory back, to make room for training."""
        self.model = None
        give_memory_back()
        return {}

    def answer(self, work):
        """Have all draws of `work` answered, one wave of all problems after the other; in a walk block by block, all
        waves of a block by the process that takes it. On CPU each core sees to a group of its own."""
        walk, places, starts = work.walk, range(len(work.problems)), True
        with ThreadPoolExecutor(self.cores, initializer=torch.set_num_threads, initargs=(1,)) as self.pool:
            for wave in itertools.count() if walk is None else ():
                groups = self._groups(work, range(len(work.problems)), wave)
                if not groups:
                    return
                self._answer_groups(work, (groups[-1 - g] for g in claims(len(groups))))  # the longest first
                work.exchange()
            while starts or not walk.over():
                starts = [start for start in (walk.take(GROUP) for _ in range(self.cores)) if start is not None]
                for wave in itertools.count():
                    blocks = [places[start:start + GROUP] for start in starts if start < walk.end]
                    groups = [group for block in blocks for group in self._groups(work, block, wave)]
                    if not groups:
                        break
                    self._answer_groups(work, groups)
                    work.settle(wait=True)
                time.sleep(0.01 * (not starts))
                work.settle()  # hears of the others
        work.exchange()

    def _groups(self, work, places, wave):
        """The requests of a wave, (place, draw, token ids), in groups."""
        requests = [(i, d, self.prompt_ids(*work.prompt(i, d))) for i in places for d in work.wave(i, wave)]
        requests.sort(key=lambda r: (len(r[2]), r))  # neighbours in length: little padding
        return [requests[at:at + GROUP] for at in range(0, len(requests), GROUP)]

    def _answer_groups(self, work, groups):
        """Generate answers to groups, and hand them to the checker, which works while the next are generated."""
        running = deque()

        def take_in():
            group, answers = running.popleft()
            for (i, d, ids), answer in zip(group, answers.result()):
                work.check(i, d, len(ids), *answer)
            work.settle()

        for group in groups:
            if not all((i, d) in work.answers for i, d, _ in group):
                rows, seed = [ids for _, _, ids in group], work.seed(*group[0][:2])  # that of its first request
                running.append((group, self.pool.submit(self._generate, rows, seed)))
            if len(running) == self.cores:
                take_in()
        while running:
            take_in()

    def _generate(self, rows, seed):
        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(device())
        stops = dict(stop_strings=self.stops, tokenizer=self.tokenizer) if self.stops else {}
        noise = [Noise(seed, **self.sampling)] if self.sampling["temperature"] > 0 else []
        with torch.inference_mode():
            out = self.model.generate(**batch, max_new_tokens=self.max_new_tokens, eos_token_id=self.ends, **stops,
                                      pad_token_id=self.tokenizer.pad_token_id, logits_processor=noise)
        answers = []
        for row in out[:, batch["input_ids"].shape[1]:].tolist():
            size = next((n for n, t in enumerate(row) if t in self.ends or t == self.tokenizer.pad_token_id), len(row))
            text, stop, _ = self.tokenizer.decode(row[:size], skip_special_tokens=True).partition(STOP)
            ended = not stop and size < len(row)  # by an end token; behind a stop string there is only padding
            answers.append((size + ended, text.strip(), "stop" if stop or ended else "length"))
        return answers


class Noise:
    """Makes of logits (rows, V) numbers of which the largest is a draw: probabilities at a temperature, cut by top_k
    (0: not) and top_p, each divided by a number from the exponential distribution, as torch.multinomial does. With a
    generator of its own, so that groups can be generated side by side."""

    def __init__(self, seed, temperature, top_k=0, top_p=1.0):
        self.temperature, self.generator = temperature, torch.Generator(device()).manual_seed(seed)
        self.cuts = [TopKLogitsWarper(top_k)] if top_k else []
        self.cuts += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    def __call__(self, ids, logits):
        logits = logits / self.temperature
        for cut in self.cuts:
            logits = cut(ids, logits)
        return logits.softmax(1) / torch.empty_like(logits).exponential_(generator=self.generator)


class VllmSampler(Sampler):
    """vLLM: one engine in each process, built once. It sleeps while the GPU trains, is given new weights without a
    restart, and after each change has to show that it has them. For a model of another shape (after a tagger, or the
    next one to score) the program starts again: an engine cannot be taken down, nor have a second beside it."""

    def __init__(self, run):
        super().__init__(run)
        self.run, self.llm, self.awake = run, None, False
        self.log = run.folder / f"vllm-{rank()}.log"

    def load(self, folder):
        if folder == self.folder and self.awake:
            return {}
        if self.llm is not None and architecture(folder) != self.architecture:
            say(f"  vLLM needs another engine for {folder}: the program starts again, with what it has")
            self._start_again()
        began, built, self.folder = time.time(), self.llm is None, None
        self._do("start" if built else f"take the weights of {folder}", self._build if built else self._send, folder)
        sent = time.time()
        tested = self._test(folder)
        self.folder, self.awake = folder, True
        return {"start_seconds" if built else "load_seconds": sent - began, "test_seconds": time.time() - sent} | tested

    def _do(self, what, action, *arguments):
        """Let the engine do something, with all that it prints in its log; if it cannot, the program ends."""
        with output_to(self.log):
            try:
                return action(*arguments)
            except Exception as error:  # an engine may raise anything
                traceback.print_exc()
                reason = lines_of(error)[0]
        fail(f"vLLM does not {what}: {reason}; see {self.log}")

    def _build(self, folder):
        # What vLLM does to its process: it reseeds the global generators (nobody here draws from them unseeded) and
        # makes torch.set_num_threads do nothing, which the trainer needs.
        self.architecture, self.environment = architecture(folder), dict(os.environ)
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
        for name, value in {"VLLM_LOGGING_LEVEL": "ERROR", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            os.environ.setdefault(name, value)
        set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind
        self.parameters_of = functools.partial(SamplingParams, output_kind=RequestOutputKind.FINAL_ONLY)
        if device().type == "cuda":
            machine = dict(enforce_eager=self.run.constants["EAGER"], enable_sleep_mode=True, max_model_len=-1,
                           gpu_memory_utilization=self.run.constants["GPU_MEMORY"])
        elif current_platform.is_cpu():  # a prompt in two pieces and a seed of its own would break the CPU's engine
            tokens = min(self.context, 8192)
            machine = dict(enforce_eager=True, enable_chunked_prefill=False, max_num_batched_tokens=tokens,
                           max_model_len=tokens, kv_cache_memory_bytes=2**30)
        else:
            raise RuntimeError("there is no GPU, and the vLLM that is installed is not its CPU build")
        # In this process, and after the process group exists: external_launcher, which takes the GPU of LOCAL_RANK
        self.llm = LLM(folder, dtype=compute_dtype(), distributed_executor_backend="external_launcher",
                       generation_config="vllm", use_tqdm_on_load=False, **machine)
        self.engine_context = self.llm.llm_engine.model_config.max_model_len
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)

    def _send(self, folder):
        on_gpu = device().type == "cuda"
        if on_gpu and not self.awake:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": read_weights(folder)})
        if on_gpu and not self.awake:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def _test(self, folder):
        """End the program unless the engine has the weights of `folder`: bit for bit where it keeps them as they are,
        and by the log-probabilities that the trainer left for a row of tokens."""
        compared, wrong = self.llm.apply_model(functools.partial(compare_weights, folder))[0]
        if wrong or not compared:
            fail(f"vLLM does not have the weights of {folder}: {len(wrong)} of {compared} tensors differ, or are not "
                 f"finite {wrong[:1]}")
        self.parameters, path = sum(t.numel() for n, t in read_weights(folder, tied=False)), Path(folder) / ROW
        if not path.exists():
            return {"tensors_equal": compared}
        tokens, trainers, exact = (read(path)[key] for key in ("tokens", "logprobs", "exact"))
        with torch.compiler.set_stance("force_eager" if device().type == "cpu" else "default"):  # saves 5-20 s
            [output] = self.llm.generate({"prompt_token_ids": tokens[:self.engine_context - 1]}, use_tqdm=False,
                                         sampling_params=self.parameters_of(max_tokens=1, prompt_logprobs=0))
        mine = [candidates[t].logprob for t, candidates in zip(tokens[1:], output.prompt_logprobs[1:])]
        error = np.abs(np.subtract(mine, trainers[:len(mine)]))
        exact = exact and compute_dtype() == torch.float32  # else bfloat16 was in it, to compute with or to save
        if not (error.max() <= 1e-4 if exact else error.mean() <= 0.03):
            fail(f"vLLM's log-probabilities are not the trainer's of {folder}: up to {error.max():.2g} off")
        return {"tensors_equal": compared, "logprob_error": float(error.max())}

    def sleep(self):
        awake, self.awake = self.awake, False
        if not awake or device().type != "cuda":
            return {}
        self._do("sleep", self.llm.sleep, 2)  # frees the weights too: the next load sends new ones
        free, total = (number / 2**30 for number in torch.cuda.mem_get_info())
        say(f"  vLLM sleeps; {total - free:.1f} of {total:.0f} GiB of the GPU are still taken"
            + ", which training will miss" * (total - free > 0.1 * total))
        return {"asleep_gib": total - free}

    def answer(self, work):
        """Have all draws of `work` answered. A process takes a problem when it has room for more requests, and sees to
        all its waves; checking goes on meanwhile. What can no longer matter is cancelled. Should the engine of one
        process fail, all end what they are at, and the program starts again, once in a phase."""
        torch.set_num_threads(threads_per_process())
        walk, places, failures = work.walk, claims(len(work.problems)), Log()
        room = min(IN_FLIGHT, math.ceil(sum(work.draws) / world_size()))
        flying, waves = {}, Counter()  # {(i, draw): vLLM's name of the request}, {i: its next wave}
        while True:
            while len(flying) < room and not failures.any() and (
                    i := walk.take() if walk else next(places, None)) is not None:
                self._request(work, i, flying, waves)
            if not flying and not work.pending and (walk is None or walk.over() or failures.any()):
                break
            for output in self._step(failures, flying) if flying else ():
                if output.finished:
                    i, d = map(int, output.request_id.split("/"))
                    del flying[i, d]
                    answer = output.outputs[0]
                    work.check(i, d, len(output.prompt_token_ids), len(answer.token_ids), answer.text.strip(),
                               answer.finish_reason)
            for i, _ in work.settle():
                wave = [(i, d) for d in work.wave(i, waves[i] - 1)]
                if work.done[i] or walk and i >= walk.end:
                    self._cancel(work, [request for request in wave if request in flying], flying)
                elif all(request in work.answers for request in wave) and not failures.any():
                    self._request(work, i, flying, waves)
            if walk:
                self._cancel(work, [request for request in flying if request[0] >= walk.end], flying)
            if not flying:
                time.sleep(0.001)
        work.exchange()
        if reasons := list(failures.new()):
            if self.environment.get(ENGINE_FAILED) == work.phase:
                fail(f"vLLM has failed again: {reasons[0]}")
            say(f"  vLLM has failed: {reasons[0]}. The program starts again, with the {len(work.answers):,} answers "
                "that it has")
            self._start_again(**{ENGINE_FAILED: work.phase})

    def _step(self, failures, flying):
        """What the engine has finished since the last step; nothing, and nothing is at work any more, if it fails."""
        try:
            return self.llm.llm_engine.step()
        except Exception as error:  # an engine may raise anything
            with output_to(self.log):
                traceback.print_exc()
            failures.append(f"{lines_of(error)[0]}; see {self.log}")
            flying.clear()
            return []

    def _start_again(self, **environment):
        if self.run.wandb:
            self.run.wandb.finish()
        start_again(self.environment | environment)

    def _request(self, work, i, flying, waves):
        """Ask for the draws of problem i's next wave that has unanswered ones."""
        while not work.done[i] and (wave := work.wave(i, waves[i])):
            waves[i] += 1
            due = [d for d in wave if (i, d) not in work.answers]
            for d in due:
                seeded = self.sampling["temperature"] > 0 and self.run.constants["SEEDED"]
                flying[i, d] = self.llm.llm_engine.add_request(
                    f"{i}/{d}", {"prompt_token_ids": self.prompt_ids(*work.prompt(i, d))}, self.parameters_of(
                        max_tokens=self.max_new_tokens, seed=work.seed(i, d) if seeded else None, stop=self.stops,
                        stop_token_ids=self.ends, **self.sampling))
            if due:
                return

    def _cancel(self, work, requests, flying):
        """Stop requests that are not needed any more; what they have cost is counted."""
        states = self.llm.llm_engine.output_processor.request_states
        for request in requests:
            state = states[flying.pop(request)]
            work.cancelled.update(cancelled=1, tokens=state.detokenizer.num_output_tokens(),
                                  prompt_tokens=0 if state.is_prefilling else state.prompt_len)
        if requests:
            self.llm.llm_engine.abort_request([f"{i}/{d}" for i, d in requests])


def architecture(folder):
    """What an engine is built for, of a model's configuration (as transformers reads it: files of different age say the
    same in different words) and its vocabulary: it can be given other weights, but nothing else."""
    other = "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "bos_token_id", "eos_token_id"
    config = AutoConfig.from_pretrained(folder).to_dict()
    vocabulary = seed_of(sorted(AutoTokenizer.from_pretrained(folder).get_vocab().items()))
    return {**{name: value for name, value in config.items() if name not in other}, "vocabulary": vocabulary}


def read_weights(folder, tied=True):
    """(name, tensor) of everything in a folder's safetensors files, and of a tied head, which is in none of them:
    without it vLLM's CPU build goes on with the old one, silently."""
    embedding = None
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                embedding = tensor if name.endswith("embed_tokens.weight") else embedding
                yield name, tensor
    if tied and AutoConfig.from_pretrained(folder).get_text_config().tie_word_embeddings:
        yield "lm_head.weight", embedding


def compare_weights(folder, model):
    """(how many parameters of vLLM's `model` could be compared with the files in `folder`, names of those that differ).

    Queries, keys and values are one matrix there, as are gate and up; embeddings may have empty rows at the end. Its
    CPU build packs the matrices away (they are empty): there norms, biases and embeddings are left."""
    sent, compared, wrong = dict(read_weights(folder)), 0, []
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, parameter in model.named_parameters():
        whole = next((w for w in fused if w in name and name not in sent), None)
        parts = [name.replace(whole, part) for part in fused[whole]] if whole else [name]
        if parameter.numel() and all(part in sent for part in parts):
            tensor = torch.cat([sent[part] for part in parts]).to(parameter)
            compared += 1
            if not torch.equal(parameter[:len(tensor)], tensor) or not tensor.isfinite().all():
                wrong.append(name)
    return compared, wrong


@contextlib.contextmanager
def output_to(path):
    """Send all that this process prints, C++ libraries included, to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(path, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), saved):
            os.dup2(copy, number)
            os.close(copy)


# 6. Log-probabilities -------------------------------------------------------------------------------------------------

LOGITS = 2**26  # made at a time, 256 MB in float32


def token_logprobs(hidden, weight, targets):
    """log p(target) of each position in float32, (P,), from hidden (P, H) and the head's weight (V, H).

    Done in chunks of at most LOGITS logits, which are made again in the backward pass."""
    def chunk(h, t):
        logits = (h @ weight.T).float() if h.dtype != torch.float64 else h @ weight.T
        return logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(1)

    size = max(1, LOGITS // weight.shape[0])
    return torch.cat([checkpoint(chunk, hidden[at:at + size], targets[at:at + size], use_reentrant=False)
                      for at in range(0, max(1, len(targets)), size)])


def packed_attention(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **other):
    """Causal attention inside each sequence of a packed row: query (1, heads, T, D) -> (1, T, heads, D)."""
    if other.get("softcap") or max_length_q > (other.get("sliding_window") or max_length_q):
        fail("this model's attention (soft-capped, or a sliding window shorter than an example) cannot be trained here")
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options = {"enable_gqa": True}
        if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11
            k, v, options = *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)), {}
        out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
                          window_size=(-1, 0), **options)
        return out[None], None
    # On CPU padded, those together whose lengths differ by less than a factor of two: a sequence alone is too small a
    # piece of work for two threads, and all together are mostly padding. Padding stands behind the real tokens, so a
    # causal mask hides it from them.
    lengths, parts, places = cu_seq_lens_q.diff().long(), [], []
    for size in lengths.log2().ceil().unique():
        start, length = (of[lengths.log2().ceil() == size, None] for of in (cu_seq_lens_q[:-1].long(), lengths))
        within = torch.arange(int(length.max()))
        at, real = (start + within).clamp(max=query.shape[2] - 1), within < length  # (S, longest)
        q, k, v = (x[0][:, at].transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        parts.append(out.transpose(1, 2)[real])
        places.append(at[real])
    return torch.cat(parts)[torch.cat(places).argsort()][None], None


def sequence_logprobs(logprobs, batch):
    """log p(completion | prompt) of each completion of a packed batch, (S,), from those of its tokens, (P,)."""
    sums = torch.stack([part.sum() for part in logprobs.split(batch["counts"])])
    return sums[:len(batch["example"])]  # the batch of a process without work has a sequence, but no example


class Policy(torch.nn.Module):
    """A causal language model that gives log-probabilities of a batch's targets, (P,): the head sees these only."""

    def __init__(self, model):
        super().__init__()
        self.body, self.head = model.get_decoder(), model.get_output_embeddings()

    def forward(self, batch):
        return token_logprobs(hidden_states(self.body, batch), self.head.weight, batch["targets"])


def hidden_states(body, batch):
    """What a transformer without its head makes of a packed batch, where it predicts: (P, H)."""
    return body(input_ids=batch["tokens"][None], position_ids=batch["positions"][None], use_cache=False,
                cu_seq_lens_q=batch["starts"], cu_seq_lens_k=batch["starts"], max_length_q=batch["longest"],
                max_length_k=batch["longest"]).last_hidden_state[0, batch["predict"]]


# 7. Packing: sequences laid end to end, no padding --------------------------------------------------------------------

def tokenize(tokenizer, example):
    """[(prompt ids, completion ids with the end token)] of an example; its completions hold no special tokens."""
    prompt, end = encode(tokenizer, example["prompt"]) if example["prompt"] else [], example["end"]
    return [(prompt, tokenizer(c, add_special_tokens=False, split_special_tokens=True)["input_ids"]
             + [tokenizer.convert_tokens_to_ids(end)]) for c in example["completions"]]


def pack(examples):
    """One packed batch of tokenized examples: tensors, how many targets each sequence has, and whose sequence it is.

    pack([[([1, 2], [3, 4])], [([5], [6])]]):
      tokens 1 2 3 4 5 6, positions 0 1 2 3 0 1, starts 0 4 6, predict 1 2 4, targets 3 4 6, counts 2 1, example 0 1
    No example at all gives a single token that predicts nothing: what a process without work joins the others with."""
    sequences = [(prompt, completion) for example in examples for prompt, completion in example] or [([0], [])]
    tokens, positions, starts, predict, targets, counts = [], [], [0], [], [], []
    for prompt, completion in sequences:
        first = max(1, len(prompt))  # without a prompt there is nothing to predict the first token from
        row = prompt + completion
        predict += range(starts[-1] + first - 1, starts[-1] + len(row) - 1)
        targets += row[first:]
        counts.append(len(row[first:]))
        tokens += row
        positions += range(len(row))
        starts.append(len(tokens))
    tensors = dict(tokens=tokens, positions=positions, predict=predict, targets=targets,
                   example=[e for e, example in enumerate(examples) for _ in example])
    batch = {name: torch.tensor(values, dtype=torch.long, device=device()) for name, values in tensors.items()}
    return batch | {"starts": torch.tensor(starts, dtype=torch.int32, device=device()), "counts": counts,
                    "longest": max(len(p) + len(c) for p, c in sequences)}


def plan_batches(lengths, batch_size, epochs, max_tokens, processes, rng):
    """Who computes what, when: [step][micro-batch] -> example numbers. Process r takes r, r + processes, ... of a step.

    A step is `batch_size` examples of the whole world (an epoch's last step may be smaller). Inside a step examples go,
    longest first, to the emptiest micro-batch, with as few micro-batches as so keep each within max_tokens (a longer
    example is alone) and their number a multiple of `processes`: both change memory and speed, never the step."""
    steps = []
    for _ in range(epochs):
        order = rng.permutation(len(lengths)).tolist()
        for at in range(0, len(order), batch_size):
            step = sorted(order[at:at + batch_size], key=lambda e: -lengths[e])
            count = math.ceil(max(1, sum(lengths[e] for e in step) / max_tokens) / processes) * processes
            while True:
                micro, load = [[] for _ in range(count)], [0] * count
                for e in step:
                    emptiest = load.index(min(load))
                    micro[emptiest].append(e)
                    load[emptiest] += lengths[e]
                if all(tokens <= max_tokens or len(m) == 1 for m, tokens in zip(micro, load)):
                    break
                count += processes
            steps.append(micro)
    return steps


# 8. Training ----------------------------------------------------------------------------------------------------------

def train(run, model, examples, loss, folder, *, round, lr, warmup, epochs, batch_size, max_tokens, weight_decay, clip,
          decay=True, reference=False):
    """Train the model in folder `model` on examples and write the result to `folder`.

    loss(logprobs, batch) -> (sum, weight, metrics): the script's own. logprobs (P,) are those of the batch's targets;
    the sum is divided by the weight of the whole step (all micro-batches, all processes): neither changes the result.
    With `reference`, batch["reference"] (S,) has log p(completion) of each completion under the model as it starts.
    AdamW; lr rises linearly over the warm-up (steps, or if below 1 their share), then stays, or with `decay` falls as a
    half cosine; all in float32 but the compute on GPU. A loss or gradient that is not finite ends the program. Goes on
    where a killed run was."""
    more = run.sampler.sleep() if run.sampler else {}
    torch.set_num_threads(threads_per_process())
    model = local_folder(model)
    tokenizer = tokenizer_to_read(model)
    tokenized = [tokenize(tokenizer, e) for e in examples]
    lengths = [sum(len(p) + len(c) for p, c in example) for example in tokenized]
    plan = plan_batches(lengths, batch_size, epochs, max_tokens, world_size(), run.rng(round, "batches"))
    network, policy, dtype = load_for_training(model)
    more["recomputed"] = spare_memory(policy, max(max_tokens, *lengths))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    progress = Progress(run, round, policy, optimizer)
    known = progress.reference_logprobs(tokenized, plan[:math.ceil(len(examples) / batch_size)]) if reference else None
    progress.load()
    with bar(len(plan), f"round {round} train") as shown:
        for step in range(len(progress.history), len(plan)):
            micro_batches = plan[step][rank()::world_size()]
            sums = gradients(policy, loss, [[tokenized[e] for e in m] for m in micro_batches],
                             [[known[e] for e in m] for m in micro_batches] if reference else None)
            sums = sum_over_processes(sums | {"save": progress.due()})
            save = sums.pop("save")
            norm = scale_and_clip(policy, world_size() / sums["weight"], clip)
            if not math.isfinite(sums["loss"]) or not math.isfinite(norm):
                stop_training(round, plan, step, examples,
                              f"loss {sums['loss'] / sums['weight']}, gradient norm {norm}")
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate_factor(step, len(plan), warmup, decay)
            optimizer.step()
            optimizer.zero_grad()
            progress.history.append(sums)
            if save:
                progress.save()
            shown.set_postfix(loss=f"{sums['loss'] / sums['weight']:.3f}", norm=f"{norm:.2f}")
            shown.update(len(progress.history) - shown.n)
    trained = time.time()
    row = row_logprobs(policy, max((sequence for e in tokenized for sequence in e), key=lambda s: len(s[0] + s[1])))
    if not all(map(math.isfinite, row["logprobs"])):
        stop_training(round, plan, len(plan) - 1, examples, "after it the model gives no numbers")
    row["exact"] = dtype == compute_dtype() == torch.float32
    save_model(network, AutoTokenizer.from_pretrained(model), dtype, folder, row)
    report_training(run, round, progress, lengths, epochs, reference, network, more | {
        "save_seconds": time.time() - trained})


def stop_training(round, plan, step, examples, why):
    """End the program because numbers are none any more, and say where to look."""
    ids = ", ".join(examples[e]["id"] for micro_batch in plan[step] for e in micro_batch)
    fail(f"round {round}, training step {step + 1} of {len(plan)}: {why}; the last good model stays. The step's "
         f"examples: {ids}")


def gradients(policy, loss, micro_batches, known=None):
    """Add up the gradients of a loss over micro-batches (and log p of their completions under the reference); the sums
    {loss, weight, ...}."""
    sums = Counter()
    for number, examples in enumerate(micro_batches):
        batch = pack(examples)
        if known:
            batch["reference"] = torch.tensor(sum(known[number], []), device=device())
        try:
            total, weight, metrics = loss(policy(batch), batch)
            total.backward()
        except torch.OutOfMemoryError:
            fail(f"the GPU has no room for {len(batch['tokens']):,} tokens at once, {len(examples)} examples; take a "
                 "lower --max-tokens or, for a single example, more GPUs")
        sums.update({"loss": total.detach(), "weight": weight, **metrics})
    return sums


def spare_memory(policy, tokens):
    """Have the policy's first blocks make their activations again in the backward pass instead of keeping them: as few
    as must, for micro-batches of so many tokens to fit into the GPU. How many; all processes agree."""
    blocks, room = policy.body.layers, min(gather(room_for_activations(policy)))
    if room == math.inf:
        return 0
    kept = (kept_bytes(policy, 128) - kept_bytes(policy, 64)) / 64  # a token's
    between = policy.head.weight.shape[1] * compute_dtype().itemsize
    count = blocks_to_recompute(len(blocks), kept, between, room / tokens)
    for block in blocks[:count]:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    if count:
        say(f"  memory   {count} of {len(blocks)} blocks make their activations twice: there is room for those of "
            f"{max(0, room) / kept:,.0f} tokens at once, of {tokens:,}")
    return count


def blocks_to_recompute(blocks, kept, between, room):
    """The fewest blocks to make their activations again so that `room` bytes a token are enough; all, if they never
    are. All together they keep `kept` bytes of a token; one that does not keeps its input (`between` bytes) and, when
    its turn comes, for a moment all."""
    for count in range(blocks):
        if kept * (blocks - count + (count > 0)) / blocks + between * count <= room:
            return count
    return blocks


def kept_bytes(policy, n):
    """Bytes that a forward pass over n tokens keeps for the backward pass, beside the parameters: counted."""
    kept = {}

    def count(tensor):
        storage, of = tensor.untyped_storage(), tensor if tensor._base is None else tensor._base
        if not isinstance(of, torch.nn.Parameter):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        policy(pack([[([0], [0] * (n - 1))]]))
    policy.reshard()  # as a backward pass would
    return sum(kept.values())


def room_for_activations(policy):
    """Bytes of this GPU for activations: nine tenths of what is free, less this process' part of gradients and AdamW's
    moments (float32), less what is whole for a while (what is in no block, and two blocks: in bfloat16, its gradients
    in both dtypes), less logits. On CPU there is no limit."""
    if device().type != "cuda":
        return math.inf
    give_memory_back()
    torch.cuda.reset_peak_memory_stats()
    part = sum(p.to_local().numel() for p in policy.parameters())
    block = sum(p.numel() for p in policy.body.layers[0].parameters())
    whole = sum(p.numel() for p in policy.parameters()) - (len(policy.body.layers) - 2) * block
    return 0.9 * torch.cuda.mem_get_info()[0] - 12 * part - 8 * whole - 16 * LOGITS


class Progress:
    """What a training keeps in unfinished/, every SAVE_MINUTES, so that a killed one goes on: weights and AdamW's state
    in shards that load at another number of processes (12 bytes a parameter, twice while it saves), the losses so far,
    and the reference's log-probabilities."""

    def __init__(self, run, round, policy, optimizer):
        self.folder, self.name = run.unfinished, f"round_{round}-{{}}"
        self.policy, self.optimizer, self.history = policy, optimizer, []
        self.minutes, self.began = run.constants["SAVE_MINUTES"], time.time()
        self.saved = self.began

    def tensors(self):
        """{name: tensor} of all that a step changes, tied ones once (AdamW's state begins here, if there was none)."""
        model, optimizer = get_state_dict(self.policy, self.optimizer)
        own = [name for name, _ in self.policy.named_parameters()]
        return {name: model[name] for name in own} | {
            f"{name}.{what}": tensor for name in own for what, tensor in optimizer["state"][name].items()}

    def due(self):
        """1 if it is time to save; rank 0's clock decides."""
        return int(rank() == 0 and time.time() - self.saved >= 60 * self.minutes)

    def save(self):
        """Save under another name, then rename; the one before goes only then."""
        path = self.folder / self.name.format(f"step_{len(self.history):07d}")
        half = path.with_name(path.name + ".part")
        tensors = self.tensors()
        places = {name: 1 + i // 32 for i, name in enumerate(tensors)}  # of 32 each: a file is built in memory
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(half, places, save_distributed=True))
        if rank() == 0:
            write(half / "progress.json", {"history": self.history, "seconds": time.time() - self.began})
            half.rename(path)
            for older in self.folder.glob(self.name.format("step_*")):
                if older != path:
                    shutil.rmtree(older)
        barrier()
        self.saved = time.time()

    def load(self):
        """Go on from the last state that was saved, if there is one."""
        paths = [p for p in sorted(self.folder.glob(self.name.format("step_*"))) if p.suffix != ".part"]
        if not gather(bool(paths))[0]:
            return
        check_weights(paths[-1])
        dcp.load(self.tensors(), storage_reader=dcp.HuggingFaceStorageReader(paths[-1]))
        left = read(paths[-1] / "progress.json")
        self.history, self.began = left["history"], self.began - left["seconds"]
        say(f"  training goes on after step {len(self.history):,}")

    def reference_logprobs(self, examples, steps):
        """[[log p of an example's first completion, of its second]], under the policy as it is; kept on disk.

        By the micro-batches of the first epoch: where policy and reference are equal, they are so exactly."""
        path = self.folder / self.name.format("reference.json")
        if not gather(path.exists())[0]:
            found = []
            with torch.no_grad():
                for micro_batch in (m for step in steps for m in step[rank()::world_size()]):
                    batch = pack([examples[e] for e in micro_batch])
                    sums = iter(sequence_logprobs(self.policy(batch), batch).tolist())
                    found += [(e, [next(sums) for _ in examples[e]]) for e in micro_batch]
            everyone = dict(pair for part in gather(found) for pair in part)
            if rank() == 0:
                write(path, [everyone[e] for e in range(len(examples))])
            barrier()
        return read(path)


def row_logprobs(policy, sequence):
    """{tokens, logprobs}: up to 256 tokens of a sequence, and log p of each but the first under the policy."""
    tokens = (sequence[0] + sequence[1])[:256]
    with torch.no_grad():
        return {"tokens": tokens, "logprobs": policy(pack([[(tokens[:1], tokens[1:])]])).tolist()}


def learning_rate_factor(step, steps, warmup, decay):
    """Rises linearly to 1 over `warmup` steps (below 1: that share of them), then stays or falls as a half cosine."""
    ramp = math.ceil(warmup * steps if warmup < 1 else warmup)
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp))) if decay else 1.0


def load_for_training(model):
    """(the model, its Policy, the folder's dtype), sharded over all processes: float32, GPUs compute in bfloat16."""
    AttentionInterface.register("packed", packed_attention)
    network = load_network(AutoModelForCausalLM, model, dtype="auto", attn_implementation="packed")
    dtype, network = network.dtype, network.float()
    names = "logit_scale", "logits_scaling", "final_logit_softcapping"
    scaled = any(getattr(network.config, name, None) for name in names)
    if scaled or network.get_output_embeddings().bias is not None:
        fail(f"{model}: a model whose head is more than one matrix cannot be trained here")
    policy = Policy(network.train())
    mixed = MixedPrecisionPolicy(param_dtype=compute_dtype(), reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh(device().type, (world_size(),))
    for block in policy.body.layers:
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    fully_shard(policy, mesh=mesh, mp_policy=mixed)
    return network, policy, dtype


def compute_dtype():
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def sum_over_processes(sums):
    """{name: sum}, added up over all processes in float64; every process must bring the same names."""
    names = sorted(sums)
    values = torch.tensor([float(sums[n]) for n in names], dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(names, values.tolist()))


def scale_and_clip(policy, factor, clip):
    """Turn the mean over processes of summed gradients into the gradient of the step's mean, and clip its norm."""
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    norm = factor * float(torch.nn.utils.get_total_norm(gradients).full_tensor())
    torch._foreach_mul_([g.to_local() for g in gradients], factor * min(1.0, clip / (norm + 1e-6)))
    return norm


# 9. Saving ------------------------------------------------------------------------------------------------------------

def save_model(network, tokenizer, dtype, folder, row):
    """Write a Hugging Face folder with weights of this dtype, and `row` to test an engine by; all take part. One tensor
    at a time is whole, and it leaves the GPU in the dtype of the file."""
    weights = {}
    for name, tensor in network.state_dict().items():
        tensor = tensor.full_tensor().to(dtype)
        if rank() == 0 and (name != "lm_head.weight" or not network.config.tie_word_embeddings):
            weights[name] = tensor.cpu()
    if rank() == 0:
        network.config.dtype = dtype
        network.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        write(folder / ROW, row)


# 10. Accounting -------------------------------------------------------------------------------------------------------

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
              "4090": 165e12, "B200": 2250e12}  # dense bfloat16; the first name that fits counts


def training_flops(parameters, tokens, reference_tokens=0):
    """6 N per token trained on (forward 2, backward 4; Kaplan et al. 2020), 2 N per token of a reference pass."""
    return parameters * (6 * tokens + 2 * reference_tokens)


def report_training(run, round, progress, lengths, epochs, reference, network, more):
    """Log and print what training did. Losses are those of the first and the last step; tokens count prompts too. The
    MFU is that of the steps, without saving."""
    parameters = sum(p.numel() for p in network.parameters())  # tied ones once
    history, seconds = progress.history, time.time() - progress.began
    first, last = ({name: step[name] / step["weight"] for name in step if name != "weight"}
                   for step in (history[0], history[-1]))
    tokens, padded = sum(lengths), len(lengths) * max(lengths)
    flops = training_flops(parameters, tokens * epochs, tokens * reference)
    peak = next((p for name, p in PEAK_FLOPS.items() if name in processor()), None)
    run.log(round, "train", steps=len(history), tokens=tokens * epochs, reference_tokens=tokens * reference,
            first_loss=first["loss"], **last, flops=flops, spent_flops=flops, seconds=seconds, **more,
            padded_flops=training_flops(parameters, padded * epochs, padded * reference),
            **({"mfu": flops / (seconds - more["save_seconds"]) / peak / world_size()} if peak else {}),
            **({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device().type == "cuda" else {}))
    say(f"  round {round}  {'train':<9} {len(history):>7,} steps, loss {first['loss']:.3f} -> {last['loss']:.3f}, "
        f"{tokens * epochs / seconds:,.0f} tok/s, {seconds:.1f} s")


# 11. Process rewards: how right each step of a response looks to a process reward model (PRM) -------------------------

REWARD_CHARACTERS = 2**15  # of a batch that a PRM reads, whoever does it: part of the result, by rounding


class RewardModel:
    """A process reward model in one of two published layouts, told apart by the name of its head's tensors.

    "v_head": Skywork-o1-Open-PRM. After the problem and a line's end, each step is followed by the token "\\n\\n",
        where a linear head gives a logit; the reward is its sigmoid. Steps are tokenized one by one.
    "score": Qwen2.5-Math-PRM. In the assistant's turn of its chat template each step is followed by <extra_0>, where a
        head of two layers gives two logits; the reward is the softmax's second, which is the sigmoid of the difference.
    So the authors' inference code and vLLM's read them; the published weights could not be downloaded here. No code of
    a folder is run. The head computes in float32, on hidden states in bfloat16 on GPUs."""

    HEADS = {"v_head": lambda hidden: torch.nn.ModuleDict({"summary": torch.nn.Linear(hidden, 1)}),
             "score": lambda hidden: torch.nn.Sequential(torch.nn.Linear(hidden, hidden), torch.nn.ReLU(),
                                                         torch.nn.Linear(hidden, 2))}
    SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # what "score" was trained with

    def __init__(self, name):
        """Read all but the backbone; ends the program where something is missing. name: a folder or a Hub name."""
        self.folder, self.body, tensors, names = local_folder(name), None, {}, set()
        self.tokenizer = load_tokenizer(name, "")
        config = AutoConfig.from_pretrained(self.folder)
        self.context = config.max_position_embeddings
        for path in weight_files(self.folder):
            with safe_open(path, "pt") as file:
                names.update(file.keys())
                tensors |= {n: file.get_tensor(n).float() for n in file.keys() if n.split(".")[0] in self.HEADS}
        self.layout = next((n.split(".")[0] for n in tensors), None)
        if self.layout is None:
            fail(f"{name} is no process reward model that is known here: no tensor {' or '.join(self.HEADS)} in it")
        self.head = self.HEADS[self.layout](config.hidden_size)
        try:
            self.head.load_state_dict({n.split(".", 1)[1]: tensor for n, tensor in tensors.items()})
        except RuntimeError as error:
            fail(f"{name}: {' '.join(lines_of(error)[1:])}")
        with torch.device("meta"):
            missing = [n for n in AutoModel.from_config(config).state_dict() if not {n, f"model.{n}"} & names]
        if missing:
            fail(f"{name}: {len(missing)} tensors of a {config.model_type} are missing: {missing[0]}, ...")
        mark = "\n\n" if self.layout == "v_head" else "<extra_0>"
        ids = self.tokenizer(mark, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids == [self.tokenizer.unk_token_id] or (
                self.layout == "score" and not self.tokenizer.chat_template):
            fail(f"{name}: its tokenizer has no token for the end of a step, {mark!r}, or no chat template")
        self.mark = ids[0]

    def load(self):
        """Bring the backbone to this process' device."""
        AttentionInterface.register("packed", packed_attention)
        self.body = load_network(AutoModel, self.folder, dtype=compute_dtype(), attn_implementation="packed")
        self.body, self.head = self.body.to(device()).eval(), self.head.to(device())

    def unload(self):
        """Give the backbone's memory back."""
        self.body = None
        give_memory_back()

    def encode(self, problem, text):
        """(token ids, the place in them of each step's mark) of a response. A step is what blank lines divide; an
        empty one is its mark alone. Beyond the model's context nothing is read: the last mark stands at its end then.
        No place at all where the problem itself is too long."""
        if self.layout == "v_head":
            ids = encode(self.tokenizer, f"{self.tokenizer.bos_token or ''}{problem['problem']}\n")
        else:
            ids = encode(self.tokenizer, make_prompt(self.tokenizer, "chat", problem, system=self.SYSTEM))
        first, places = len(ids), []
        steps = self.tokenizer(text.split("\n\n"), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for step in steps:
            ids += [*step, self.mark]
            places.append(len(ids) - 1)
        if len(ids) > self.context:
            places = [place for place in places if place < self.context - 1] + [self.context - 1]
            ids = ids[:self.context - 1] + [self.mark]
        return ids, places if first < self.context else []

    def logits(self, rows):
        """The logit of "this step is right" at each place of rows [(ids, places)], (P,), in their order."""
        batch = pack([[([], ids)] for ids, _ in rows])
        batch["predict"] = torch.tensor([start + place for start, (_, places) in zip(batch["starts"].tolist(), rows)
                                         for place in places], dtype=torch.long, device=device())
        hidden = hidden_states(self.body, batch).float()
        if self.layout == "v_head":
            return self.head["summary"](hidden)[:, 0]
        return self.head(hidden) @ torch.tensor([-1.0, 1.0], device=device())


def reward_batches(sizes):
    """{key: characters} as lists of keys, the longest first, REWARD_CHARACTERS or a little more in each."""
    keys = sorted(sizes, key=lambda key: (-sizes[key], key))
    capped = [min(REWARD_CHARACTERS, sizes[key]) for key in keys]  # so that a huge one is alone
    starts = (np.cumsum(capped) - capped) // REWARD_CHARACTERS
    return [[keys[at] for at in of] for _, of in itertools.groupby(range(len(keys)), key=starts.__getitem__)]


def step_rewards(run, prm, problems, responses, *, round, phase):
    """[[reward of each step, 0 to 1]] of responses, in their order, by a RewardModel; equal ones are read once.

    Responses are packed end to end, without padding, into batches by their length in characters: whoever reads one, it
    is the same. What was read is kept in unfinished/. To a problem beyond the PRM's context there is no reward."""
    slept = run.sampler.sleep() if run.sampler else {}
    by_id, began = {p["id"]: p for p in problems}, time.time()
    batches = reward_batches({(r["id"], r["text"]): len(by_id[r["id"]]["problem"]) + len(r["text"]) for r in responses})
    name, found, mine = f"round_{round}-{phase}@{{}}.jsonl", {}, {}  # by what a batch holds
    for path in run.unfinished.glob(name.format("*")):
        for line in open(path, errors="replace"):
            with contextlib.suppress(ValueError, TypeError):  # a line that a kill cut short
                found.update([json.loads(line)])
    barrier()  # everybody has read before anybody writes on
    prm.load()

    def read_batch(number):
        if (key := f"{seed_of(batches[number]):x}") in found:
            return key, None
        rows = [prm.encode(by_id[i], text) for i, text in batches[number]]
        with torch.inference_mode():
            rewards = prm.logits(rows).sigmoid().tolist()
        if not all(map(math.isfinite, rewards)):
            fail(f"{prm.folder}: its rewards are not numbers, in answers to {batches[number][0][0]} and others")
        rewards = iter(rewards)
        return key, [[len(ids), [next(rewards) for _ in places]] for ids, places in rows]

    # On CPU each core reads a batch of its own, with one thread: so the result does not depend on how many there are
    on_gpu, numbers = device().type == "cuda", claims(len(batches))
    workers = 1 if on_gpu else threads_per_process()
    run.unfinished.mkdir(parents=True, exist_ok=True)
    with (ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
          open(run.unfinished / name.format(rank()), "a") as file,
          bar(len(batches), f"round {round} {phase}") as shown):
        while some := list(itertools.islice(numbers, workers)):
            for key, rewards in (map if on_gpu else pool.map)(read_batch, some):
                if rewards is not None:
                    mine[key] = rewards
                    file.write("\n" + json.dumps([key, rewards]) + "\n")
                    file.flush()
                shown.update(world_size())
    cost = 2 * sum(p.numel() for p in prm.body.parameters())
    prm.unload()
    for part in gather(mine):
        found.update(part)
    read_as = dict(pair for b in batches for pair in zip(b, found[f"{seed_of(b):x}"], strict=True))
    lengths = [size for size, _ in read_as.values()]
    rewards = [read_as[r["id"], r["text"]][1] for r in responses]
    steps, full, seconds = sum(map(len, rewards)), lengths.count(prm.context), time.time() - began
    flops = cost * sum(lengths)
    run.log(round, phase, responses=len(responses), different=len(lengths), steps=steps, tokens=sum(lengths),
            filled_context=full, unread=rewards.count([]), flops=flops, spent_flops=flops,
            padded_flops=cost * len(lengths) * max(lengths), seconds=seconds, **slept)
    say(f"  round {round}  {phase:<9} {len(responses):>7,} answers, {len(lengths):,} different, of {steps:,} steps, "
        f"{sum(lengths) / seconds:,.0f} tok/s, {seconds:.1f} s")
    if full:
        say(f"           {full:,} answers reach the end of the PRM's context, {prm.context:,} tokens, and are read up "
            f"to there; {rewards.count([]):,} have no reward, as their problem alone is longer")
    return rewards


# 12. Clusters of texts: what they are about, without anybody's labels -------------------------------------------------

TFIDF_SIZE = 512  # numbers in the vector of a text
EMBEDDED_TOKENS = 2**15  # of a batch, at most
START_POINTS = 50_000  # points that k-means' starts are tried on


def cluster_texts(encoder, texts, k, rng):
    """The cluster of each text, (n,), of at most k; 0 is the largest. encoder: "tfidf", or a folder or Hub name. Done
    by one process; the others, which wait for it, get zeros."""
    if rank() > 0:
        return np.zeros(len(texts), dtype=int)
    return kmeans(tfidf(texts) if encoder == "tfidf" else embed(encoder, texts), k, rng)[0]


def tfidf(texts):
    """Unit vectors of texts, (n, TFIDF_SIZE) float32: their words, of two letters or more, and LaTeX's commands, each
    weighted by (1 + ln count) ln(n / texts that have it), at a place and with a sign that its hash gives it (so that
    words which share a place cancel out on average; Weinberger et al. 2009)."""
    vocabulary, found, lengths = {}, array.array("q"), []
    for text in texts:
        words = re.findall(r"\\?[^\W\d_]{2,}", text.lower())
        found.extend(vocabulary.setdefault(word, len(vocabulary)) for word in words)
        lengths.append(len(words))
    n, size = len(texts), max(1, len(vocabulary))
    cells, counts = np.unique(np.repeat(np.arange(n), lengths) * size + np.array(found, dtype=int), return_counts=True)
    rows, words = np.divmod(cells, size)
    hashes = np.array([seed_of(word) for word in vocabulary] or [0])
    rarity = np.log(n / np.bincount(words, minlength=size).clip(1)) + 1e-3  # of a word that all have: not quite 0
    values = np.where(hashes & 1, 1, -1)[words] * (1 + np.log(counts)) * rarity[words]
    vectors = np.zeros(n * TFIDF_SIZE, dtype=np.float32)
    np.add.at(vectors, rows * TFIDF_SIZE + (hashes // 2 % TFIDF_SIZE)[words], values.astype(np.float32))
    return F.normalize(torch.from_numpy(vectors).view(n, TFIDF_SIZE)).numpy()


def read_encoder(name):
    """(folder, tokenizer, longest text in tokens) of a sentence encoder; ends the program if it is not one whose vector
    of a text is the mean of those of its tokens. None for "tfidf"."""
    if name == "tfidf":
        return None
    folder, tokenizer = Path(local_folder(name)), load_tokenizer(name, "")
    config, files = AutoConfig.from_pretrained(folder), (
        "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json")
    layers, pooling, about, defaults = (read(folder / file) if (folder / file).exists() else {} for file in files)
    try:
        ways = {k if value is True else str(value) for k, value in pooling.items() if "pooling_mode" in k and value}
        more = {layer["type"].split(".")[-1] for layer in layers} - {"Transformer", "Pooling", "Normalize"}
        more |= {key for of in (about, defaults) for key in ("do_lower_case", "default_prompt_name") if of.get(key)}
        more |= {"encoder and decoder"} if config.is_encoder_decoder else set()
    except (AttributeError, KeyError, TypeError):
        fail(f"{name}: one of {', '.join(files)} is not as sentence-transformers writes it")
    if more or not ways <= {"mean", "pooling_mode_mean_tokens"}:
        fail(f"{name}: its vectors are not plain means over tokens, as here ({', '.join(sorted(more or ways))})")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or fail(f"{name}: no token to pad with")
    most = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    return folder, tokenizer, about.get("max_seq_length") or min(most, tokenizer.model_max_length)


def embed(name, texts):
    """Unit vectors of texts, (n, H) float32, by a sentence encoder: the mean of its last hidden states over the tokens
    of a text, cut at the encoder's length, as sentence-transformers has it (Reimers & Gurevych 2019). In fixed batches
    of texts of like length, and on CPU with one thread: the same in every process."""
    folder, tokenizer, longest = read_encoder(name)
    body = load_network(AutoModel, folder, dtype=torch.float32).to(device()).eval()
    order, size = sorted(range(len(texts)), key=lambda i: -len(texts[i])), max(1, EMBEDDED_TOKENS // longest)
    vectors, threads = np.zeros((len(texts), body.config.hidden_size), dtype=np.float32), torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode(), bar(len(texts), "embedded") as shown:
        for at in range(0, len(texts), size):
            batch = tokenizer([texts[i] for i in order[at:at + size]], padding=True, truncation=True,
                              max_length=longest, return_tensors="pt").to(device())
            mask = batch["attention_mask"][..., None]
            means = (body(**batch).last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors[order[at:at + size]] = F.normalize(means).cpu().numpy()
            shown.update(len(means))
    torch.set_num_threads(threads)
    if not np.isfinite(vectors).all():
        fail(f"{name}: its vectors are not numbers")
    return vectors


def kmeans(points, k, rng, starts=10):
    """(cluster of each point (n,), the largest being 0; sum of squared distances to their centres) of points (n, H).

    Lloyd's algorithm, from the best of `starts` beginnings by k-means++ (Arthur & Vassilvitskii 2007), each of which is
    tried on START_POINTS points. There are fewer clusters where these points do not differ enough. With one thread: the
    same in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    points = torch.from_numpy(points)
    some = points[rng.permutation(len(points))[:START_POINTS]]
    tried = [lloyd(some, first_centres(some, k, rng)) for _ in range(starts)]
    clusters, _, inertia = lloyd(points, min(tried, key=lambda of: of[2])[1])
    torch.set_num_threads(threads)
    order = torch.bincount(clusters).argsort(descending=True, stable=True)
    return order.argsort()[clusters].numpy(), inertia


def squared_distances(points, centres):
    """(n, k), of points (n, H) and centres (k, H); 0 where rounding alone tells a point from a centre."""
    squares = torch.linalg.vector_norm(points, dim=1) ** 2
    distances = squares[:, None] + centres.square().sum(1) - points @ (2 * centres.T)
    return distances.masked_fill_(distances < 1e-5 * squares.max(), 0)


def first_centres(points, k, rng):
    """k-means++: each next centre is a point with a chance in proportion to its squared distance to those before."""
    centres = points[[rng.integers(len(points))]]
    nearest = squared_distances(points, centres)[:, 0]
    while len(centres) < k and (sums := nearest.double().cumsum(0))[-1] > 0:
        place = torch.searchsorted(sums, float(rng.random() * sums[-1]), right=True)
        centres = torch.cat([centres, points[place][None]])
        nearest = torch.minimum(nearest, squared_distances(points, centres[-1:])[:, 0])
    return centres


def lloyd(points, centres, steps=100):
    """(clusters, centres, sum of squared distances) when no point moves any more, or after so many steps. A cluster
    that runs empty begins again at the point farthest from its centre."""
    before = None
    for _ in range(steps):
        nearest, clusters = squared_distances(points, centres).min(1)
        sizes = torch.bincount(clusters, minlength=len(centres))
        empty = (sizes == 0).nonzero()[:, 0]
        if before is not None and torch.equal(clusters, before) and not len(empty):
            break
        before = clusters
        centres = torch.zeros_like(centres).index_add_(0, clusters, points) / sizes.clamp(min=1)[:, None]
        centres[empty] = points[nearest.topk(len(empty)).indices]
    return clusters, centres, float(nearest.double().sum())


def last_list(text):
    """The phrases of the last JSON list of texts in what a model wrote, in lower case, each once; or of the last that
    is nearly one (single quotes, a comma too many); [] if there is none. Looks at the last 2,000 characters."""
    lists, nearly = [], []
    for found in reversed(re.findall(r'\[(?:[^]["]|"[^"]{0,200}")*\]', text[-2000:])):
        strict = re.sub(r'(?<!\\)\\(?![\\"]|u[0-9a-f]{4})', r"\\\\", found)  # \frac is LaTeX, not a form feed
        try:
            lists.append([phrase for phrase in json.loads(strict) if isinstance(phrase, str)])
        except ValueError:
            nearly.append([m[2] for m in re.finditer(r"(?s)(?<=[\[,])\s*([\"'])(.{1,80}?)\1(?=\s*[,\]])", found)])
    for phrases in lists + nearly:
        phrases = dict.fromkeys(" ".join(phrase.lower().split()) for phrase in phrases)
        if phrases := [p for p in phrases if len(p) <= 80 and re.search(r"[^\W\d_]{2}", p)]:
            return phrases
    return []


def typical_words(words, clusters, n=4):
    """The n words that are most typical of each cluster: many in it, and few outside. words: an iterable of each text's
    different ones; clusters: of each text, in the same order."""
    counts, everywhere = [Counter() for _ in range(1 + max(clusters))], Counter()
    for of_text, cluster in zip(words, clusters):
        counts[cluster].update(of_text)
        everywhere.update(of_text)
    return [sorted(of, key=lambda word: (-of[word] ** 2 / everywhere[word], word))[:n] for of in counts]
