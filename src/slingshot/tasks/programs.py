"""Small programming problems by composition: operations on lists, words, text and numbers, in a row.

    Write a Python function f(x) for a list x of whole numbers: keep the even ones, then multiply each by 3, then take
    the sum. Return the result.

Every problem has hidden tests whose outcomes differ if any of its operations is left out, and a worked solution of one
line per operation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slingshot.tasks.hidden_tests import HiddenTests
from slingshot.tasks.task import Language, Problem, Style

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
    """What it takes and gives, as an expression of x, as a function, and in words; `k` is a number in all of them."""

    takes: str
    gives: str
    code: str
    function: Callable[[Any, int], Any]
    en: str
    ja: str
    ks: range = range(1)

    def phrase(self, language: str, k: int) -> str:
        return (self.ja if language == "ja" else self.en).format(k=k)


# fmt: off
OPERATIONS = [
    Operation("numbers", "numbers", "sorted(x)", lambda x, k: sorted(x),
              "sort in ascending order", "昇順に並べ"),
    Operation("numbers", "numbers", "sorted(x, reverse=True)", lambda x, k: sorted(x, reverse=True),
              "sort in descending order", "降順に並べ"),
    Operation("numbers", "numbers", "x[::-1]", lambda x, k: x[::-1],
              "reverse the order", "逆順にし"),
    Operation("numbers", "numbers", "[n for n in x if n % 2 == 0]", lambda x, k: [n for n in x if n % 2 == 0],
              "keep the even ones", "偶数だけを残し"),
    Operation("numbers", "numbers", "[n for n in x if n % 2 == 1]", lambda x, k: [n for n in x if n % 2 == 1],
              "keep the odd ones", "奇数だけを残し"),
    Operation("numbers", "numbers", "[n for n in x if n > {k}]", lambda x, k: [n for n in x if n > k],
              "keep those above {k}", "{k}より大きいものだけを残し", range(10)),
    Operation("numbers", "numbers", "[n for n in x if n < {k}]", lambda x, k: [n for n in x if n < k],
              "keep those below {k}", "{k}より小さいものだけを残し", range(10)),
    Operation("numbers", "numbers", "[n for n in x if n % {k} == 0]", lambda x, k: [n for n in x if n % k == 0],
              "keep the multiples of {k}", "{k}の倍数だけを残し", range(3, 6)),
    Operation("numbers", "numbers", "[n + {k} for n in x]", lambda x, k: [n + k for n in x],
              "add {k} to each", "各数に{k}を足し", range(1, 10)),
    Operation("numbers", "numbers", "[n - {k} for n in x]", lambda x, k: [n - k for n in x],
              "subtract {k} from each", "各数から{k}を引き", range(1, 10)),
    Operation("numbers", "numbers", "[n * {k} for n in x]", lambda x, k: [n * k for n in x],
              "multiply each by {k}", "各数に{k}を掛け", range(2, 10)),
    Operation("numbers", "numbers", "[n % {k} for n in x]", lambda x, k: [n % k for n in x],
              "replace each by its remainder modulo {k}", "各数を{k}で割った余りに替え", range(2, 10)),
    Operation("numbers", "numbers", "[n * n for n in x]", lambda x, k: [n * n for n in x],
              "square each", "各数を2乗し"),
    Operation("numbers", "numbers", "[abs(n) for n in x]", lambda x, k: [abs(n) for n in x],
              "replace each by its absolute value", "各数を絶対値に替え"),
    Operation("numbers", "numbers", "[-n for n in x]", lambda x, k: [-n for n in x],
              "negate each", "各数の符号を変え"),
    Operation("numbers", "numbers", "x[:{k}]", lambda x, k: x[:k],
              "keep the first {k}", "先頭の{k}個だけを残し", range(1, 5)),
    Operation("numbers", "numbers", "x[{k}:]", lambda x, k: x[k:],
              "drop the first {k}", "先頭の{k}個を除き", range(1, 4)),
    Operation("numbers", "numbers", "x[::2]", lambda x, k: x[::2],
              "keep every second one, from the first on", "先頭から1つおきに残し"),
    Operation("numbers", "numbers", "list(dict.fromkeys(x))", lambda x, k: list(dict.fromkeys(x)),
              "drop those that came before", "重複を除き"),
    Operation("numbers", "numbers", "x + x[::-1]", lambda x, k: x + x[::-1],
              "append the same in reverse", "逆順のものを後ろにつなぎ"),
    Operation("numbers", "number", "sum(x)", lambda x, k: sum(x),
              "take the sum", "合計を求め"),
    Operation("numbers", "number", "len(x)", lambda x, k: len(x),
              "count them", "個数を数え"),
    Operation("numbers", "number", "max(x, default=0)", lambda x, k: max(x, default=0),
              "take the largest, 0 if there is none", "最大のもの(なければ0)を取り"),
    Operation("numbers", "number", "min(x, default=0)", lambda x, k: min(x, default=0),
              "take the smallest, 0 if there is none", "最小のもの(なければ0)を取り"),
    Operation("numbers", "number", "len(set(x))", lambda x, k: len(set(x)),
              "count the different ones", "異なるものの個数を数え"),
    Operation("numbers", "number", "x.count({k})", lambda x, k: x.count(k),
              "count how often {k} occurs", "{k}の個数を数え", range(4)),
    Operation("numbers", "words", "[str(n) for n in x]", lambda x, k: [str(n) for n in x],
              "write each as text", "各数を文字列にし"),
    Operation("words", "words", "sorted(x)", lambda x, k: sorted(x),
              "sort alphabetically", "辞書順に並べ"),
    Operation("words", "words", "sorted(x, key=len)", lambda x, k: sorted(x, key=len),
              "sort by length, shortest first", "短い順に並べ"),
    Operation("words", "words", "x[::-1]", lambda x, k: x[::-1],
              "reverse the order", "逆順にし"),
    Operation("words", "words", "[w[::-1] for w in x]", lambda x, k: [w[::-1] for w in x],
              "reverse each", "各語を逆から書き"),
    Operation("words", "words", "[w.upper() for w in x]", lambda x, k: [w.upper() for w in x],
              "write each in capitals", "各語を大文字にし"),
    Operation("words", "words", "[w for w in x if len(w) > {k}]", lambda x, k: [w for w in x if len(w) > k],
              "keep those longer than {k}", "{k}文字より長いものだけを残し", range(2, 5)),
    Operation("words", "words", "[w for w in x if len(w) < {k}]", lambda x, k: [w for w in x if len(w) < k],
              "keep those shorter than {k}", "{k}文字より短いものだけを残し", range(3, 6)),
    Operation("words", "words", "[w[:{k}] for w in x]", lambda x, k: [w[:k] for w in x],
              "cut each after {k} letters", "各語の先頭{k}文字だけを残し", range(1, 4)),
    Operation("words", "words", "[w + w for w in x]", lambda x, k: [w + w for w in x],
              "write each twice", "各語を2回書き"),
    Operation("words", "words", "x[:{k}]", lambda x, k: x[:k],
              "keep the first {k}", "先頭の{k}個だけを残し", range(1, 5)),
    Operation("words", "words", "x[{k}:]", lambda x, k: x[k:],
              "drop the first {k}", "先頭の{k}個を除き", range(1, 4)),
    Operation("words", "words", "list(dict.fromkeys(x))", lambda x, k: list(dict.fromkeys(x)),
              "drop those that came before", "重複を除き"),
    Operation("words", "numbers", "[len(w) for w in x]", lambda x, k: [len(w) for w in x],
              "replace each by its length", "各語を長さに替え"),
    Operation("words", "text", "' '.join(x)", lambda x, k: " ".join(x),
              "join with spaces", "空白でつなぎ"),
    Operation("words", "text", "''.join(x)", lambda x, k: "".join(x),
              "join without spaces", "間をあけずにつなぎ"),
    Operation("words", "text", "max(x, key=len, default='')", lambda x, k: max(x, key=len, default=""),
              "take the first of the longest, nothing if there is none", "最も長い最初のもの(なければ空)を取り"),
    Operation("words", "number", "len(x)", lambda x, k: len(x),
              "count them", "個数を数え"),
    Operation("text", "text", "x[::-1]", lambda x, k: x[::-1],
              "reverse it", "逆から書き"),
    Operation("text", "text", "x.upper()", lambda x, k: x.upper(),
              "write it in capitals", "大文字にし"),
    Operation("text", "text", "x.replace(' ', '')", lambda x, k: x.replace(" ", ""),
              "drop the spaces", "空白を除き"),
    Operation("text", "text", "x.replace('a', 'o')", lambda x, k: x.replace("a", "o"),
              "replace every a by o", "aをすべてoに替え"),
    Operation("text", "text", "''.join(c for c in x if c not in 'aeiou')", lambda x, k: re.sub("[aeiou]", "", x),
              "drop the letters a, e, i, o and u", "a、e、i、o、uを除き"),
    Operation("text", "text", "x[:{k}]", lambda x, k: x[:k],
              "keep the first {k} characters", "先頭の{k}文字だけを残し", range(2, 8)),
    Operation("text", "text", "x[{k}:]", lambda x, k: x[k:],
              "drop the first {k} characters", "先頭の{k}文字を除き", range(1, 6)),
    Operation("text", "text", "x * {k}", lambda x, k: x * k,
              "repeat it {k} times", "{k}回繰り返し", range(2, 5)),
    Operation("text", "text", "''.join(sorted(x))", lambda x, k: "".join(sorted(x)),
              "sort its characters", "文字を並べ替えて昇順にし"),
    Operation("text", "words", "x.split()", lambda x, k: x.split(),
              "split into words", "単語に分け"),
    Operation("text", "number", "len(x)", lambda x, k: len(x),
              "count its characters", "文字数を数え"),
    Operation("text", "number", "x.count('e')", lambda x, k: x.count("e"),
              "count the letter e", "eの個数を数え"),
    Operation("text", "number", "len(x.split())", lambda x, k: len(x.split()),
              "count its words", "単語の個数を数え"),
    Operation("number", "number", "x + {k}", lambda x, k: x + k,
              "add {k}", "{k}を足し", range(1, 10)),
    Operation("number", "number", "x - {k}", lambda x, k: x - k,
              "subtract {k}", "{k}を引き", range(1, 10)),
    Operation("number", "number", "x * {k}", lambda x, k: x * k,
              "multiply by {k}", "{k}を掛け", range(2, 10)),
    Operation("number", "number", "x // {k}", lambda x, k: x // k,
              "divide by {k} and round down", "{k}で割って切り捨て", range(2, 10)),
    Operation("number", "number", "x % {k}", lambda x, k: x % k,
              "take the remainder modulo {k}", "{k}で割った余りを取り", range(2, 10)),
    Operation("number", "number", "x * x", lambda x, k: x * x,
              "square it", "2乗し"),
    Operation("number", "number", "abs(x)", lambda x, k: abs(x),
              "take the absolute value", "絶対値を取り"),
    Operation("number", "number", "sum(int(d) for d in str(abs(x)))", lambda x, k: sum(int(d) for d in str(abs(x))),
              "take the sum of its digits", "各桁の数字の和を求め"),
    Operation("number", "numbers", "[int(d) for d in str(abs(x))]", lambda x, k: [int(d) for d in str(abs(x))],
              "list its digits", "各桁の数字のリストにし"),
    Operation("number", "numbers", "list(range(1, x + 1))", lambda x, k: list(range(1, x + 1)),
              "list the whole numbers from 1 to it", "1からその数までの整数のリストにし"),
    Operation("number", "text", "str(x)", lambda x, k: str(x),
              "write it as text", "文字列にし"),
]
# fmt: on
_BY_KIND = {kind: [index for index, operation in enumerate(OPERATIONS) if operation.takes == kind] for kind in _KINDS}

Step = tuple[int, int]  # the index of an operation and its k


def generate(rng: random.Random, level: int, languages: Sequence[Language]) -> Iterator[Problem]:
    """Problems of both splits without end, of 1 to `level` operations, each length as likely."""
    while True:
        kind = rng.choice(list(_KINDS))
        chain = _chain(rng, kind, rng.randint(1, level))
        key = f"{kind}/{solve(chain)}"
        if (tests := _tests(random.Random(key), kind, chain)) is None:
            continue
        inputs, outputs = tuple([given] for given, _ in tests), tuple(made for _, made in tests)
        language = rng.choice(languages)
        steps = _THEN[language].join(OPERATIONS[index].phrase(language, k) for index, k in chain)
        yield Problem(
            prompt=_PROMPT[language].format(kind=_KINDS[kind][language], steps=steps),
            key=key,
            answer=solve(chain),
            language=language,
            data={"hidden": asdict(HiddenTests((), inputs, outputs, "f")), "chain": chain, "level": len(chain)},
        )


def solve(chain: Sequence[Step]) -> str:
    """A function of one line per operation."""
    lines = [OPERATIONS[index].code.replace("{k}", str(k)) for index, k in chain]
    return "\n".join(["def f(x):", *(f"    x = {line}" for line in lines[:-1]), f"    return {lines[-1]}"])


def explain(problem: Problem, style: Style, rng: random.Random) -> str:
    """Each operation in words beside its expression; with slips, one is first taken for another."""
    said = []
    chain = problem.data["chain"]
    slipped = rng.randrange(len(chain)) if style == "slips" else -1
    for place, (index, k) in enumerate(chain):
        operation = OPERATIONS[index]
        code = operation.code.replace("{k}", str(k))
        if place == slipped:
            wrong = OPERATIONS[rng.choice([other for other in _BY_KIND[operation.takes] if other != index])]
            code = _WAIT[problem.language].format(
                wrong=wrong.code.replace("{k}", str(rng.choice(wrong.ks))), right=code
            )
        said.append(f"{operation.phrase(problem.language, k)}: {code}")
    return "\n".join(said)


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
