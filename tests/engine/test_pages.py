"""The pool of pages against a model of it, under any order of what sequences do."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from slingshot.engine.batch import PAGE
from slingshot.engine.pages import PagePool, prefix_keys

COUNT = 7


class PoolMachine(RuleBasedStateMachine):
    """Sequences of a few tokens, which share prefixes often. What a page holds is written down as the tokens it stands
    for with all before them; no page that somebody relies on may ever hold anything else."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.pool, self.content, self.alive = PagePool(COUNT), {}, {}
        self.numbers = iter(range(10**9))

    @rule(target=sequences, letters=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def admit(self, letters):
        """A prompt of full pages, each of one letter: what is known of it is reused, the rest is computed."""
        ids = [letter for letter in letters for _ in range(PAGE)]
        keys = list(prefix_keys(ids))
        assert len(keys) == len(letters)
        pages = self.pool.match(keys)
        for index, page in enumerate(pages):
            assert self.content[page] == tuple(letters[: index + 1])
        if self.pool.available < len(letters) - len(pages):
            self.pool.release(pages)
            return multiple()
        for index in range(len(pages), len(letters)):
            page = self.pool.take()
            assert page is not None and not any(page in held for held, _ in self.alive.values())
            self.content[page] = tuple(letters[: index + 1])
            pages.append(page)
            self.pool.register(page, keys[index])
        name = next(self.numbers)
        self.alive[name] = pages, tuple(letters)
        return name

    @rule(target=sequences, name=sequences)
    def fork(self, name):
        if name not in self.alive:
            return multiple()
        pages, letters = self.alive[name]
        self.pool.hold(pages)
        number = next(self.numbers)
        self.alive[number] = list(pages), letters
        return number

    @rule(name=sequences, letter=st.integers(2, 9))
    def write_to_the_last_page(self, name, letter):
        """A page of one's own is written to; a shared one is copied before."""
        if name not in self.alive:
            return
        pages, letters = self.alive[name]
        letters = (*letters[:-1], letter)
        if self.pool.shared(pages[-1]) or self.content[pages[-1]] != letters:  # a registered page is never written to
            if not self.pool.available:
                return
            page = self.pool.take()
            self.pool.release([pages[-1]])
            pages[-1] = page
        self.content[pages[-1]] = letters
        self.alive[name] = pages, letters

    @rule(name=consumes(sequences))
    def leave(self, name):
        if name in self.alive:
            self.pool.release(self.alive.pop(name)[0])

    @rule()
    def forget(self):
        self.pool.forget()

    @invariant()
    def every_page_is_accounted_for(self):
        self.pool.check()
        held = {page for pages, _ in self.alive.values() for page in pages}
        assert self.pool.used == len(held) and self.pool.available == COUNT - len(held)
        for pages, letters in self.alive.values():
            assert [self.content[page] for page in pages] == [letters[: end + 1] for end in range(len(letters))]

    def teardown(self):
        for pages, _ in self.alive.values():
            self.pool.release(pages)
        assert self.pool.used == 0
        self.pool.check()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_key_names_all_tokens_up_to_the_pages_end():
    ids = list(range(100, 150))
    keys = list(prefix_keys(ids))
    assert len(keys) == len(set(keys)) == 3 and list(prefix_keys(ids[:47])) == keys[:2]
    assert list(prefix_keys(ids[16:], after=keys[0])) == keys[1:]
    assert list(prefix_keys([99, *ids[1:]]))[2] != keys[2]  # the third page's own tokens are the same


@pytest.mark.parametrize("kept", [False, True])
def test_pages_are_taken_until_none_is_left_and_untouched_ones_last(kept):
    pool = PagePool(3)
    pages = [pool.take(), pool.take()]
    if kept:
        pool.register(pages[0], b"key")
    pool.release(pages)
    again = [pool.take() for _ in range(4)]
    assert again[:3] == ([pages[1], 3, pages[0]] if kept else [*pages, 3]) and again[3] is None
    assert pool.match([b"key"]) == []
