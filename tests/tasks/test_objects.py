"""Tests that change their arguments, and tests of classes: what an answer's objects may say, and what they may not."""

import pytest

from slingshot.sandbox.program import ProgramLimits, isolation
from slingshot.tasks.hidden_tests import HiddenTests
from slingshot.tasks.judge import passed_tests

pytestmark = pytest.mark.skipif(bool(isolation().missing), reason="this machine cannot contain programs")

LIMITS = ProgramLimits(seconds=30.0)
IN_PLACE = """
def order(x): x.sort()
def grow(x, more, *, by): x["a"].append(more); more.add(by); return len(x)
def drain(x): x.clear(); return []
def flip(x): x.reverse(); return len(x)
class Solution:
    def order(self, x, *, down=False): x.sort(reverse=down)
def strange(x): x.append(print); return 1
"""


@pytest.mark.parametrize(
    ("test", "holds"),
    [
        ("x = [3, 1, 2]; order(x); assert x == [1, 2, 3]", True),
        ("x = [3, 1, 2]\nassert order(x) is None and x == [1, 2, 3]", True),
        ("x = [3, 1, 2]\ny = x\nfor _ in range(2): order(x)\nassert y is x and y == [1, 2, 3]", True),
        ("y = {1}\nx = {'a': []}\nz = x['a']\nn = grow(x, y, by=2)\nassert z == [y] and y == {1, 2} and n == 1", True),
        ("x = [3, 1]\nassert drain(x) == sorted(x)", False), ("x = [3, 1]\nr = drain(x)\nassert x == r == []", True),
        ("x = [3, 1]\nassert strange(x) == 1 and x == [3, 1]", True), ("x = (2, [1])\norder(x[1])", True),
        ("x = [2, 3, 1]\nSolution().order(x, down=True)\nassert x == [3, 2, 1]", True),
        ("x = [2, 1]\nif flip(x) == 2: assert x == [1, 2]\nelse: assert False", True),
        ("x, y = [1], [2, 1]\nfor _ in range(flip(y)): x += y\nassert x == [1, 1, 2, 1, 2]", True),
    ],
)  # fmt: skip
def test_what_a_function_makes_of_its_arguments_is_seen_by_the_statements_behind(test, holds):
    assert passed_tests(IN_PLACE, HiddenTests(tests=(test,)), LIMITS) == [holds]


def test_a_function_that_returns_nothing_is_judged_by_its_first_argument():
    hidden = HiddenTests(inputs=([[3, 1]], [[2, 5, 4]]), outputs=([1, 3], [2, 4, 5]), entry_point="order")
    method = "class Solution:\n    def order(self, nums): nums.sort()"
    assert passed_tests(IN_PLACE, hidden, LIMITS) == passed_tests(method, hidden, LIMITS) == [True, True]
    assert passed_tests("def order(x): pass", hidden, LIMITS, all_tests=True) == [False, False]
    assert passed_tests("def order(x): x.sort(); return 0", hidden, LIMITS) == [False]
    begins = HiddenTests(inputs=([[1]], [[3, 1]], [[]]), outputs=([1], [1, 3], []), entry_point="order")
    assert passed_tests(IN_PLACE, begins, LIMITS) == [True, True, True]  # it has nothing to do for two of them
    assert passed_tests("def order(x): pass", begins, LIMITS, all_tests=True) == [False, False, False]


STACK = """
class Stack:
    kind = "last in"
    def __init__(self, items=()): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def pop(self):
        if not self.items: raise IndexError("empty")
        return self.items.pop()
    def copy(self): return Stack(self.items)
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __contains__(self, item): return item in self.items
    def __getitem__(self, place): return self.items[place]
    def __setitem__(self, place, item): self.items[place] = item
    def __eq__(self, other): return isinstance(other, Stack) and self.items == other.items
    def __hash__(self): return len(self.items)
    def __add__(self, other): return Stack(self.items + other.items)
    def __mul__(self, times): return Stack(self.items * times)
    def __rmul__(self, times): return self * times
    def __lt__(self, other): return len(self) < len(other)
    def __str__(self): return f"Stack of {len(self)}"
    @classmethod
    def of(cls, *items): return cls(items)
def largest(stack): return max(stack.items)
"""
USED = """
s = Stack()
assert s.push(1).push(2).pop() == 2 and s.items == [1] and Stack.kind == "last in" and not Stack()
assert len(s) == 1 and 1 in s and 2 not in s and list(s) == [1] and s[0] == 1 and str(s) == "Stack of 1"
s[0] = 5; s.name = "mine"
assert s == Stack.of(5) != Stack.of(6) and s.name == "mine" and s.copy() == s and s is not s.copy()
assert s + Stack([1]) == Stack.of(5, 1) and s * 2 == 2 * s == Stack([5, 5]) and {s: 1}[Stack([5])] == 1
assert sorted([Stack([1, 2]), s])[0] == s and s.push([1, {2}]).pop() == [1, {2}]
assert isinstance(s.copy(), Stack) and not isinstance(1, Stack) and 5 in s.copy() and s.copy()
try: Stack().pop()
except IndexError: pass
else: assert False
"""


def test_tests_hold_objects_of_the_answers_classes():
    assert passed_tests(STACK, HiddenTests(tests=(USED,)), LIMITS) == [True]
    check = "def check(made):\n    assert made([1]).pop() == 1\n    assert len(made([1, 2]).push(3)) == 3"
    assert passed_tests(STACK, HiddenTests(tests=(check,), entry_point="Stack"), LIMITS) == [True]
    assert passed_tests(STACK, HiddenTests(tests=("assert Solution().f(1) == 2",)), LIMITS) == [False]
    method = "class Solution:\n    def f(self, x): return x + 1"
    assert passed_tests(method, HiddenTests(tests=("assert Solution().f(1) == 2",)), LIMITS) == [True]


YES = """
class Yes:
    def __init__(self, *a): pass
    def __eq__(self, other): return True
    __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = __eq__
    def __sub__(self, other): return 0
    __rsub__ = __abs__ = __float__ = __add__ = __mod__ = __sub__
    def __getattr__(self, name): return Yes()
    def __call__(self, *a): return Yes()
    def __iter__(self): return iter([])
Stack = Yes
"""
ZERO = YES.replace("return 0", "return Yes()") + "Yes.__bool__ = lambda self: False"


@pytest.mark.parametrize(
    "test",
    [
        "assert Stack().pop() == 1", "assert 1 == Stack().items", "assert Stack().total > 0", "assert not Stack() != 1",
        "assert abs(Stack().total - 5.0) < 1e-6", "assert 5 - Stack().total == 0", "assert Stack().total in (1, 2)",
        "import math\nassert math.isclose(Stack().total, 5)",
        "assert [Stack().pop()] == [1]", "assert len(Stack()) == 1", "assert 1 in Stack().items",
        "assert Stack().name().startswith('a')", "assert Stack().items.issuperset({1})",
    ],
)  # fmt: skip
def test_an_object_that_says_yes_to_all_is_equal_to_no_plain_value(test):
    assert passed_tests(YES, HiddenTests(tests=(test,)), LIMITS) == [False]


def test_a_difference_that_is_an_object_is_neither_zero_nor_another():
    for test in ("assert not Stack().total - 5", "assert not 2 * Stack().total", "assert Stack().total - 5 == Stack()"):
        assert passed_tests(ZERO, HiddenTests(tests=(test,)), LIMITS) == [False]


HEARS = """
known = []
class Hears:
    def __sub__(self, other): known.append(other); return self
class Stack:
    def total(self): return known[-1] if known else Hears()
"""


def test_what_an_object_was_compared_with_is_forgotten_before_the_next_test():
    hidden = HiddenTests(tests=("assert abs(Stack().total() - 5.0) < 1e-6",) * 2)
    assert passed_tests(HEARS, hidden, LIMITS, all_tests=True) == [False, False]


STOPS = "def f(*x): raise StopIteration\nclass Stack:\n    def pop(self): raise StopIteration"


@pytest.mark.parametrize(
    "test", ["assert all(map(lambda x: f(x) == 1, [1]))", "assert not any(map(lambda x: Stack().pop(), [1]))"]
)
def test_an_answer_does_not_end_the_loop_of_a_test(test):
    assert passed_tests(STOPS, HiddenTests(tests=(test,)), LIMITS) == [False]


@pytest.mark.parametrize("call", ["f({}, 1)", "Stack()"])
def test_an_answer_that_is_not_there_raises_no_error_that_a_test_wants(call):
    test = f"try: {call}\nexcept KeyError: pass\nelse: assert False"
    assert passed_tests("", HiddenTests(tests=(test,)), LIMITS) == [False]


def test_methods_of_a_class_are_called_in_turn():
    methods, given = ["Stack", "push", "push", "pop", "__len__"], [[], [1], [2], [], []]
    hidden = HiddenTests(inputs=([methods, given],), outputs=([None, None, None, 2, 1],), entry_point="Stack")
    silent = STACK.replace("; return self", "")
    assert passed_tests(silent, hidden, LIMITS) == [True]
    assert passed_tests(silent.replace("pop()\n", "pop(0)\n"), hidden, LIMITS) == [False]
    assert passed_tests("class Stack: pass", hidden, LIMITS) == [False]
