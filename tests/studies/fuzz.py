"""Unvetted texts through all of checking: what study.py fuzz and test_checking.py run."""
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, settings, strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import sai_dpo  # noqa: E402

PIECES = [  # forms that graders are known to trip over; {} is filled with other texts
    "\\boxed{{{}}}", "\\boxed{{", "{}}}", "\\frac{{{}}}{{{}}}", "\\dfrac{}{}", "\\sqrt[{}]{{{}}}",
    "{}^{{{}}}",
    "{}_{{{}}}", "\\left({}\\right)", "\\left[{},{}\\right)", "\\{{{},{}\\}}", "({},{},{})",
    "\\begin{{pmatrix}}{}&{}\\\\{}&{}\\end{{pmatrix}}", "\\begin{{cases}}{}\\end{{cases}}",
    "\\sum_{{k={}}}^{{{}}} {}",
    "\\prod_{{n={}}}^{{{}}} {}", "\\int_{{{}}}^{{{}}} {} dx", "\\lim_{{x \\to {}}} {}",
    "\\log_{{{}}} {}", "{}!",
    "{}!!", "\\binom{{{}}}{{{}}}", "\\text{{{}}}", "\\mbox{{{}}}", "|{}|", "\\lfloor {} \\rfloor", "{} = {}",
    "{} < {} \\le {}", "{} \\cup {}", "{} \\in {}", "\\pm {}", "{} \\pmod{{{}}}", "{} \\%", "\\mathrm{{{}}}",
    "\\overline{{{}}}", "\\operatorname{{{}}}({})", "the answer is {}.", "#### {}", "A: {}", "**{}**", "${}$",
    "\\[{}\\]", "<think>{}</think>{}", "{}\n\n{}", "{} or {}", "not {}", "{},{}", "{} {}",
    "{}{}", "-{}", "{}+{}",
    "{}\\cdot {}", "{}/{}"]
ATOMS = ["0", "1", "2", "-7", "18", "0.5", ".5", "1e400", "1e-9", "99999999999999999999", "10^{10^{10}}",
         "9" * 400, "3.14159", "50\\%", "x", "y", "n", "\\pi", "e", "i", "\\infty", "-\\infty", "\\emptyset",
         "\\mathbb{R}", "A", "(B)", "C.", "yes", "no", "True", "\\theta", "\\alpha", "x^2+1", "\\sin x",
         "5\\text{ cm}", "12:30", "\\$5", "1,000", "1\\,000", "٣", "½", "²", "∞", "１２", "\u200b", "\u0000",
         "\u001b[31m", "�", "{", "}", "\\", "$", "&", "%", "#", "^", "_", "~", "\\\\", "\\left(", "\\right]",
         "\\end{", "\n", "__import__('os').system('touch pwned')",
         "().__class__.__bases__[0].__subclasses__()", "open('pwned','w').write('x')",
         "exec(\"open('pwned','w')\")", "eval(2**2**2**99)", "lambda: 0", "os.system", "S(1)/0",
         "Symbol('x')", "subprocess.run('id')", "{{7*7}}", "${jndi:ldap://x}", "%s%n", "<script>",
         "'; DROP TABLE", "zoo", "nan", "oo", "E", "Q", "gamma", "yotta", "N(9**9**9)"]
ATOM = st.one_of(
    st.sampled_from(ATOMS), st.integers(-10**6, 10**6).map(str), st.text(max_size=8),
    st.decimals(allow_nan=False, places=3, min_value=-9999, max_value=9999).map(str))


def bigger(inner):
    """Return texts made of other texts: one of PIECES filled with four of them, or one repeated."""
    filled = st.tuples(st.sampled_from(PIECES), st.lists(inner, min_size=4, max_size=4))
    repeated = st.tuples(inner, st.integers(2, 40))
    return st.one_of(filled.map(lambda pair: pair[0].format(*pair[1])),
                     repeated.map(lambda pair: pair[0][:200] * pair[1]))


TEXTS = st.recursive(ATOM, bigger, max_leaves=12)
KINDS = st.sampled_from(["math", "math", "math", "choice", "label", "yesno"])
CASES = st.lists(st.tuples(TEXTS, TEXTS, KINDS),
                 min_size=20, max_size=20)  # 20 are checked side by side


def children_of(pid):
    """Return the running child processes of a process; each of its threads lists its own."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += path.read_text().split()
    return found


def fuzz(examples, derandomize=False):
    """Check 20 pairs of texts `examples` times. Return {executions, verdicts by reason, the slowest of what the main
    process does itself, in seconds, files and processes left over, and the pairs called right that are not the same
    text}."""
    others = set(children_of(os.getpid()))
    checker = common.Checker(2)
    reasons = Counter()
    slowest = Counter()
    right = set()
    here = os.getcwd()

    def timed(what, function, *arguments):
        seconds = []
        # repeat if it may have been a pause of Python's garbage collector
        while not seconds or seconds[-1] > 0.05 and len(seconds) < 3:
            began = time.thread_time()
            result = function(*arguments)
            seconds.append(time.thread_time() - began)
        slowest[what] = max(slowest[what], min(seconds))
        return result

    @settings(max_examples=examples, derandomize=derandomize, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(CASES)
    def check(cases):
        waiting = []
        for gold, text, kind in cases:
            problem = {"id": "f/1", "problem": gold, "answer": gold, "kind": kind}
            if kind == "label":
                problem["choices"] = ["entailment", "neutral", gold]
            waiting.append((gold, text, kind, checker.submit(problem, text)))
            timed("stated", common.final_answer, text)
            timed("canonical", common.canonical, text[:common.LONG])
            timed("tags", sai_dpo.parse_tags, {"text": text, "finish": "stop"})
            timed("steps", sai_dpo.steps_of, text)
            timed("shown", common.printable, text).encode()
        for gold, text, kind, verdict in waiting:
            began = time.time()
            correct, reason = verdict.result(120)
            slowest["wait"] = max(slowest["wait"], time.time() - began)
            assert reason in ("equal", "different", "no_answer",
                              *common.NO_VERDICT) and correct == (reason == "equal")
            reasons[reason] += 1
            if correct and kind == "math" and gold.strip() != text.strip():
                right.add((gold, text))

    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)  # so do the workers started now
        check()
        left = os.listdir(empty)
        os.chdir(here)
    alive = checker.submit({"answer": "4"}, "\\boxed{2+2}").result() == (True, "equal")
    started = []
    for worker in set(children_of(os.getpid())) - others:
        started += children_of(worker)
    return {"executions": sum(reasons.values()), "reasons": dict(reasons), "slowest": dict(slowest),
            "alive": alive, "files": left, "processes": started, "right": sorted(right, key=lambda pair: len(
        pair[0] + pair[1]))}


if __name__ == "__main__":
    found = fuzz(int(sys.argv[1]))
    for pair in found.pop("right")[:200]:
        print("called right:", json.dumps(pair))
    print(json.dumps(found, indent=1))
