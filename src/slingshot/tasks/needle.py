"""The task `needle`: a number that stands somewhere in a long text is asked for at its end.

    The grass is green. The code of the lamp is 417. The sky is blue. ... What is the code of the lamp?   ->  417
    草は緑だ。灯の番号は417。空は青い。...灯の番号は?                                                            ->  417

The needle in a haystack, with other needles as distractors (RULER's multi-key retrieval, arXiv 2404.06654). Where it
lies is a problem's level, in quarters of the text: "1/4" is its beginning.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from pydantic import Field

from slingshot.tasks.arithmetic import NumberTask
from slingshot.tasks.task import Problem, Style

_HAY = {
    "en": (
        "The grass is green. ",
        "The sky is blue. ",
        "The sun is yellow. ",
        "Here we go. ",
        "There and back again. ",
    ),
    "ja": ("草は緑だ。", "空は青い。", "日は黄色い。", "さあ行こう。", "行って戻る。"),
}
_THINGS = {
    "en": ("lamp", "door", "boat", "tree", "bell", "coat", "ring", "wall", "bird", "cup", "gate", "road"),
    "ja": ("灯", "扉", "船", "木", "鐘", "服", "輪", "壁", "鳥", "杯", "門", "道"),
}
_NEEDLE = {"en": "The code of the %s is %d. ", "ja": "%sの番号は%d。"}
_ASKS = {"en": "What is the code of the %s?", "ja": "%sの番号は?"}


class Needle(NumberTask):
    """`min_sentences` to `max_sentences` of hay, each number as likely, and `needles` among them; one is asked for."""

    min_sentences: int = Field(10, ge=0, le=100_000, description="sentences of hay, at least")
    max_sentences: int = Field(40, ge=0, le=100_000, description="sentences of hay, at most; about 5 tokens each")
    needles: int = Field(2, ge=1, le=12, description="numbers in the text, of which one is asked for")

    def generate(self, rng: random.Random) -> Iterator[Problem]:
        while True:
            language = self.languages[int(rng.random() * len(self.languages))]
            hay = rng.choices(_HAY[language], k=rng.randint(self.min_sentences, self.max_sentences))
            things = rng.sample(_THINGS[language], self.needles)
            codes = [rng.randint(100, 999) for _ in things]
            places = sorted(rng.randint(0, len(hay)) for _ in things)
            for place, told in sorted(zip(places, zip(things, codes, strict=True), strict=True), reverse=True):
                hay.insert(place, _NEEDLE[language] % told)
            asked = rng.randrange(self.needles)
            level = f"{min(3, 4 * places[asked] // max(1, len(hay) - self.needles)) + 1}/4"
            prompt = "".join(hay) + _ASKS[language] % things[asked]
            needle = (_NEEDLE[language] % (things[asked], codes[asked])).strip()
            yield Problem(prompt, prompt, str(codes[asked]), language, {"level": level, "needle": needle})

    def reasoning(self, problem: Problem, style: Style, rng: random.Random) -> str:
        return str(problem.data["needle"])
