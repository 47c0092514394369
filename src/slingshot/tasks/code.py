"""The task `code`: Python that hidden tests judge, problems without end.

    Write a Python function f(x) for a list x of whole numbers: keep the even ones, then multiply each by 3, then take
    the sum. Return the result.

A problem is a row of operations on lists, words, text and numbers. Its hidden tests have other outcomes if any of them
is left out, and a worked solution has one line for each. An answer is the last ```python block in what was said;
tasks/judge.py judges it, in a worker. `code:humaneval` and `code:mine.jsonl` are data sets (tasks/dataset.py) with the
verifier `code`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field

from slingshot.sandbox.worker import Target
from slingshot.tasks.code_verifier import MARGIN, CodeLimits, code_block, require_judging
from slingshot.tasks.hidden_tests import HiddenTests
from slingshot.tasks.task import GeneratedTask, Problem, Reward, Style
from slingshot.tasks.verification import IsolatedTask
from slingshot.tasks.verifiers import MAX_ANSWER

_TESTS = 10
_LARGE = 10_000
_PROMPT = {
    "en": "Write a Python function f(x) for {kind}: {steps}. Return the result.",
    "ja": "{kind}に対するPythonの関数f(x)を書け。{steps}、その結果を返せ。",
}
_THEN = {"en": ", then ", "ja": "、"}
_WAIT = {"en": "{wrong}, wait, {right}", "ja": "{wrong}、いや{right}"}
_KINDS = {
    "numbers": {"en": "a list x of whole numbers", "ja": "整数のリストx"},
    "words": {"en": "a list x of words", "ja": "単語のリストx"},
    "text": {"en": "a text x", "ja": "文字列x"},
    "number": {"en": "a whole number x", "ja": "整数x"},
}
_VOWELS = "aeiou"


@dataclass(frozen=True)
class Operation:
    """The kinds it takes and gives, as an expression of x, a function and in words; `k` is a number in all of them."""

    takes: str
    gives: str
    code: str
    function: Callable[[Any, int], Any]
    en: str
    ja: str
    ks: range = range(1)

    def spelt(self, k: int) -> str:
        return self.code.replace("{k}", str(k))

    def phrase(self, language: str, k: int) -> str:
        return (self.ja if language == "ja" else self.en).format(k=k)


# fmt: off
_TABLE: dict[str, list[tuple[Any, ...]]] = {  # by what they take: gives, code, function, en, ja and maybe ks
    "numbers": [
        ("numbers", "sorted(x)", lambda x, k: sorted(x), "sort in ascending order", "昇順に並べ"),
        ("numbers", "sorted(x, reverse=True)", lambda x, k: sorted(x, reverse=True),
         "sort in descending order", "降順に並べ"),
        ("numbers", "x[::-1]", lambda x, k: x[::-1], "reverse the order", "逆順にし"),
        ("numbers", "[n for n in x if n % 2 == 0]", lambda x, k: [n for n in x if n % 2 == 0],
         "keep the even ones", "偶数だけを残し"),
        ("numbers", "[n for n in x if n % 2 == 1]", lambda x, k: [n for n in x if n % 2 == 1],
         "keep the odd ones", "奇数だけを残し"),
        ("numbers", "[n for n in x if n > {k}]", lambda x, k: [n for n in x if n > k],
         "keep those above {k}", "{k}より大きいものだけを残し", range(10)),
        ("numbers", "[n for n in x if n < {k}]", lambda x, k: [n for n in x if n < k],
         "keep those below {k}", "{k}より小さいものだけを残し", range(10)),
        ("numbers", "[n for n in x if n % {k} == 0]", lambda x, k: [n for n in x if n % k == 0],
         "keep the multiples of {k}", "{k}の倍数だけを残し", range(3, 6)),
        ("numbers", "[n + {k} for n in x]", lambda x, k: [n + k for n in x],
         "add {k} to each", "各数に{k}を足し", range(1, 10)),
        ("numbers", "[n - {k} for n in x]", lambda x, k: [n - k for n in x],
         "subtract {k} from each", "各数から{k}を引き", range(1, 10)),
        ("numbers", "[n * {k} for n in x]", lambda x, k: [n * k for n in x],
         "multiply each by {k}", "各数に{k}を掛け", range(2, 10)),
        ("numbers", "[n % {k} for n in x]", lambda x, k: [n % k for n in x],
         "replace each by its remainder modulo {k}", "各数を{k}で割った余りに替え", range(2, 10)),
        ("numbers", "[n * n for n in x]", lambda x, k: [n * n for n in x], "square each", "各数を2乗し"),
        ("numbers", "[abs(n) for n in x]", lambda x, k: [abs(n) for n in x],
         "replace each by its absolute value", "各数を絶対値に替え"),
        ("numbers", "[-n for n in x]", lambda x, k: [-n for n in x], "negate each", "各数の符号を変え"),
        ("numbers", "x[:{k}]", lambda x, k: x[:k], "keep the first {k}", "先頭の{k}個だけを残し", range(1, 5)),
        ("numbers", "x[{k}:]", lambda x, k: x[k:], "drop the first {k}", "先頭の{k}個を除き", range(1, 4)),
        ("numbers", "x[::2]", lambda x, k: x[::2], "keep every second one, from the first on", "先頭から1つおきに残し"),
        ("numbers", "list(dict.fromkeys(x))", lambda x, k: list(dict.fromkeys(x)),
         "drop those that came before", "重複を除き"),
        ("numbers", "x + x[::-1]", lambda x, k: x + x[::-1], "append the same in reverse", "逆順のものを後ろにつなぎ"),
        ("number", "sum(x)", lambda x, k: sum(x), "take the sum", "合計を求め"),
        ("number", "len(x)", lambda x, k: len(x), "count them", "個数を数え"),
        ("number", "max(x, default=0)", lambda x, k: max(x, default=0),
         "take the largest, 0 if there is none", "最大のもの(なければ0)を取り"),
        ("number", "min(x, default=0)", lambda x, k: min(x, default=0),
         "take the smallest, 0 if there is none", "最小のもの(なければ0)を取り"),
        ("number", "len(set(x))", lambda x, k: len(set(x)), "count the different ones", "異なるものの個数を数え"),
        ("number", "x.count({k})", lambda x, k: x.count(k), "count how often {k} occurs", "{k}の個数を数え", range(4)),
        ("words", "[str(n) for n in x]", lambda x, k: [str(n) for n in x], "write each as text", "各数を文字列にし"),
    ],
    "words": [
        ("words", "sorted(x)", lambda x, k: sorted(x), "sort alphabetically", "辞書順に並べ"),
        ("words", "sorted(x, key=len)", lambda x, k: sorted(x, key=len),
         "sort by length, shortest first", "短い順に並べ"),
        ("words", "x[::-1]", lambda x, k: x[::-1], "reverse the order", "逆順にし"),
        ("words", "[w[::-1] for w in x]", lambda x, k: [w[::-1] for w in x], "reverse each", "各語を逆から書き"),
        ("words", "[w.upper() for w in x]", lambda x, k: [w.upper() for w in x],
         "write each in capitals", "各語を大文字にし"),
        ("words", "[w for w in x if len(w) > {k}]", lambda x, k: [w for w in x if len(w) > k],
         "keep those longer than {k}", "{k}文字より長いものだけを残し", range(2, 5)),
        ("words", "[w for w in x if len(w) < {k}]", lambda x, k: [w for w in x if len(w) < k],
         "keep those shorter than {k}", "{k}文字より短いものだけを残し", range(3, 6)),
        ("words", "[w[:{k}] for w in x]", lambda x, k: [w[:k] for w in x],
         "cut each after {k} letters", "各語の先頭{k}文字だけを残し", range(1, 4)),
        ("words", "[w + w for w in x]", lambda x, k: [w + w for w in x], "write each twice", "各語を2回書き"),
        ("words", "x[:{k}]", lambda x, k: x[:k], "keep the first {k}", "先頭の{k}個だけを残し", range(1, 5)),
        ("words", "x[{k}:]", lambda x, k: x[k:], "drop the first {k}", "先頭の{k}個を除き", range(1, 4)),
        ("words", "list(dict.fromkeys(x))", lambda x, k: list(dict.fromkeys(x)),
         "drop those that came before", "重複を除き"),
        ("numbers", "[len(w) for w in x]", lambda x, k: [len(w) for w in x],
         "replace each by its length", "各語を長さに替え"),
        ("text", "' '.join(x)", lambda x, k: " ".join(x), "join with spaces", "空白でつなぎ"),
        ("text", "''.join(x)", lambda x, k: "".join(x), "join without spaces", "間をあけずにつなぎ"),
        ("text", "max(x, key=len, default='')", lambda x, k: max(x, key=len, default=""),
         "take the first of the longest, nothing if there is none", "最も長い最初のもの(なければ空)を取り"),
        ("number", "len(x)", lambda x, k: len(x), "count them", "個数を数え"),
    ],
    "text": [
        ("text", "x[::-1]", lambda x, k: x[::-1], "reverse it", "逆から書き"),
        ("text", "x.upper()", lambda x, k: x.upper(), "write it in capitals", "大文字にし"),
        ("text", "x.replace(' ', '')", lambda x, k: x.replace(" ", ""), "drop the spaces", "空白を除き"),
        ("text", "x.replace('a', 'o')", lambda x, k: x.replace("a", "o"), "replace every a by o", "aをすべてoに替え"),
        ("text", "''.join(c for c in x if c not in 'aeiou')", lambda x, k: "".join(c for c in x if c not in "aeiou"),
         "drop the letters a, e, i, o and u", "a、e、i、o、uを除き"),
        ("text", "x[:{k}]", lambda x, k: x[:k],
         "keep the first {k} characters", "先頭の{k}文字だけを残し", range(2, 8)),
        ("text", "x[{k}:]", lambda x, k: x[k:], "drop the first {k} characters", "先頭の{k}文字を除き", range(1, 6)),
        ("text", "x * {k}", lambda x, k: x * k, "repeat it {k} times", "{k}回繰り返し", range(2, 5)),
        ("text", "''.join(sorted(x))", lambda x, k: "".join(sorted(x)),
         "sort its characters", "文字を並べ替えて昇順にし"),
        ("words", "x.split()", lambda x, k: x.split(), "split into words", "単語に分け"),
        ("number", "len(x)", lambda x, k: len(x), "count its characters", "文字数を数え"),
        ("number", "x.count('e')", lambda x, k: x.count("e"), "count the letter e", "eの個数を数え"),
        ("number", "len(x.split())", lambda x, k: len(x.split()), "count its words", "単語の個数を数え"),
    ],
    "number": [
        ("number", "x + {k}", lambda x, k: x + k, "add {k}", "{k}を足し", range(1, 10)),
        ("number", "x - {k}", lambda x, k: x - k, "subtract {k}", "{k}を引き", range(1, 10)),
        ("number", "x * {k}", lambda x, k: x * k, "multiply by {k}", "{k}を掛け", range(2, 10)),
        ("number", "x // {k}", lambda x, k: x // k,
         "divide by {k} and round down", "{k}で割って切り捨て", range(2, 10)),
        ("number", "x % {k}", lambda x, k: x % k,
         "take the remainder modulo {k}", "{k}で割った余りを取り", range(2, 10)),
        ("number", "x * x", lambda x, k: x * x, "square it", "2乗し"),
        ("number", "abs(x)", lambda x, k: abs(x), "take the absolute value", "絶対値を取り"),
        ("number", "sum(int(d) for d in str(abs(x)))", lambda x, k: sum(int(d) for d in str(abs(x))),
         "take the sum of its digits", "各桁の数字の和を求め"),
        ("numbers", "[int(d) for d in str(abs(x))]", lambda x, k: [int(d) for d in str(abs(x))],
         "list its digits", "各桁の数字のリストにし"),
        ("numbers", "list(range(1, x + 1))", lambda x, k: list(range(1, x + 1)),
         "list the whole numbers from 1 to it", "1からその数までの整数のリストにし"),
        ("text", "str(x)", lambda x, k: str(x), "write it as text", "文字列にし"),
    ],
}
# fmt: on
OPERATIONS = [Operation(takes, *row) for takes, rows in _TABLE.items() for row in rows]
_BY_KIND = {kind: [index for index, operation in enumerate(OPERATIONS) if operation.takes == kind] for kind in _KINDS}

Step = tuple[int, int]  # the index of an operation and its k


class Code(CodeLimits, IsolatedTask, GeneratedTask):
    """Generated problems of 1 to `level` operations, each length as likely; an answer is right when all tests hold."""

    timeout: float = Field(10.0, gt=0, description="seconds that all tests of an answer may take together")
    level: int = Field(2, ge=1, le=3, description="operations in a row, at most")

    @classmethod
    def load(cls, params: dict[str, Any]) -> Code:
        """The task "code". Raises SlingshotError where no answer can be judged."""
        task = cls.parse(params, "code")
        require_judging(task.trusted)
        return task

    @property
    def target(self) -> Target:
        settings = self.model_dump(include={"timeout", *CodeLimits.model_fields})
        return Target("slingshot.tasks.code_verifier:CodeJudge", (settings,), timeout=self.timeout + MARGIN)

    def generate(self, rng: random.Random) -> Iterator[Problem]:
        while True:
            kind = rng.choice(list(_KINDS))
            chain = _chain(rng, kind, rng.randint(1, self.level))
            key = f"{kind}/{solve(chain)}"
            if (tests := _tests(random.Random(key), kind, chain)) is None:
                continue
            inputs, outputs = tuple([given] for given, _ in tests), tuple(made for _, made in tests)
            language = rng.choice(self.languages)
            steps = _THEN[language].join(OPERATIONS[index].phrase(language, k) for index, k in chain)
            yield Problem(
                prompt=_PROMPT[language].format(kind=_KINDS[kind][language], steps=steps),
                key=key,
                answer=solve(chain),
                language=language,
                data={"hidden": asdict(HiddenTests((), inputs, outputs, "f")), "chain": chain, "level": len(chain)},
            )

    def reasoning(self, problem: Problem, style: Style, rng: random.Random) -> str:
        """Each operation in words beside its expression; with slips, one is first taken for another."""
        said = []
        chain = problem.data["chain"]
        slipped = rng.randrange(len(chain)) if style == "slips" else -1
        for place, (index, k) in enumerate(chain):
            operation = OPERATIONS[index]
            code = operation.spelt(k)
            if place == slipped:
                wrong = OPERATIONS[rng.choice([other for other in _BY_KIND[operation.takes] if other != index])]
                code = _WAIT[problem.language].format(wrong=wrong.spelt(rng.choice(wrong.ks)), right=code)
            said.append(f"{operation.phrase(problem.language, k)}: {code}")
        return "\n".join(said)

    def read(self, text: str) -> str | None:
        return code_block(text) if len(text) <= MAX_ANSWER else None

    def extract(self, text: str) -> str | None:
        return self.read(text)

    def verify(self, problem: Problem, text: str, lenient: bool = False) -> Reward:
        """Whether all tests hold; with `partial` the share of those that do."""
        answer = self.read(text)
        return Reward(0.0, None) if answer is None else self.scored(answer, "score", problem.data["hidden"], answer)


def solve(chain: Sequence[Step]) -> str:
    """A function of one line per operation."""
    lines = [OPERATIONS[index].spelt(k) for index, k in chain]
    return "\n".join(["def f(x):", *(f"    x = {line}" for line in lines[:-1]), f"    return {lines[-1]}"])


def _chain(rng: random.Random, kind: str, length: int) -> list[Step]:
    chain = []
    for _ in range(length):
        index = rng.choice(_BY_KIND[kind])
        chain.append((index, rng.choice(OPERATIONS[index].ks)))
        kind = OPERATIONS[index].gives
    return chain


def _apply(chain: Sequence[Step], value: Any) -> Any:
    """None where it would become large."""
    for index, k in chain:
        value = OPERATIONS[index].function(value, k)
        if isinstance(value, int) and abs(value) > _LARGE:
            return None
    return value


def _tests(rng: random.Random, kind: str, chain: Sequence[Step]) -> list[tuple[Any, Any]] | None:
    """Inputs and outputs; None where an operation changes nothing, or most outputs are alike."""
    given = [_input(rng, kind) for _ in range(_TESTS)]
    made = [_apply(chain, value) for value in given]
    if None in made or len({repr(value) for value in made}) < 4 or len(repr(made)) > 4000:
        return None
    for place, (index, _) in enumerate(chain):
        shorter = [*chain[:place], *chain[place + 1 :]]
        if OPERATIONS[index].takes == OPERATIONS[index].gives and [_apply(shorter, value) for value in given] == made:
            return None
    return list(zip(given, made, strict=True))


def _input(rng: random.Random, kind: str) -> Any:
    if kind == "number":
        return rng.randint(-20, 100)
    if kind == "numbers":
        return [rng.randint(-9, 15) for _ in range(rng.randint(0, 8))]
    words = ["".join(rng.choice("bdglnrst") + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3))) for _ in range(5)]
    words = [word[: rng.randint(1, 6)] for word in rng.choices(words, k=rng.randint(0, 6))]
    return words if kind == "words" else " ".join(words)
