# SPDX-License-Identifier: Apache-2.0
"""Drawn images of 32 x 32 pixels with questions and their answers, and the processor of the model that is trained on them.

Every answer is one word, so that an answer is right or wrong. Five kinds of images: a coloured shape, two of them (asked for
shape, colour and place), spots of two colours to be counted, a digit, and a word.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoTokenizer
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

SIZE = 32
COLORS = {
    "red": (210, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 210),
    "yellow": (225, 200, 40),
    "purple": (140, 60, 170),
    "orange": (235, 130, 30),
    "white": (245, 245, 245),
    "gray": (130, 130, 130),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
WORDS = (
    "CAT",
    "DOG",
    "SUN",
    "MAP",
    "KEY",
    "BOX",
    "JET",
    "OWL",
    "FIG",
    "ZIP",
    "HUT",
    "LEG",
    "PIN",
    "RAY",
    "VAN",
    "WEB",
)
PLACES = ("left", "right", "above", "below")
KINDS = ("shape", "color", "place", "count", "number", "word")
IMAGE, START, END, VIDEO, PAD, STOP = (
    "<|image|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|video|>",
    "<pad>",
    "</s>",
)
VOCABULARY = (
    *(
        PAD,
        STOP,
        IMAGE,
        VIDEO,
        START,
        END,
        "?",
        "what",
        "which",
        "where",
        "how",
        "many",
        "is",
        "the",
        "of",
        "are",
        "there",
    ),
    *("shape", "color", "place", "number", "word", "written", "spots", "thing", "from"),
    *COLORS,
    *SHAPES,
    *PLACES,
    *WORDS,
    *map(str, range(10)),
)


def draw(seed: int) -> dict[str, Any]:
    """One sample: `image`, its `questions` with kinds and answers, and the first of them as `kind`, `question`, `answer`.

    The same for the same seed.
    """
    own = random.Random(seed)
    image = Image.new("RGB", (SIZE, SIZE), own.choice([(20, 20, 25), (60, 50, 45), (35, 55, 60)]))
    brush = ImageDraw.Draw(image)
    scene = own.choice(("one", "two", "spots", "number", "word"))
    if scene == "one":
        questions = _one(own, brush)
    elif scene == "two":
        questions = _two(own, brush)
    elif scene == "spots":
        questions = _spots(own, brush)
    else:
        answer, color = str(own.randrange(10)) if scene == "number" else own.choice(WORDS), own.choice(list(COLORS))
        place = (own.randrange(1, 16 if scene == "number" else 6), own.randrange(1, 10))
        font = ImageFont.load_default(18 if scene == "number" else 12)
        brush.text(place, answer, fill=COLORS[color], font=font)
        asked = "which number is there" if scene == "number" else "which word is written"
        questions = [(scene, asked, answer), ("color", f"what color is the {scene}", color)]
    own.shuffle(questions)
    kind, question, answer = questions[0]
    return {"image": image, "questions": questions, "kind": kind, "question": question, "answer": answer}


def _spots(own: random.Random, brush: Any) -> list[tuple[str, str, str]]:
    colors = own.sample(list(COLORS), 2)
    cells = own.sample([(x, y) for x in range(4) for y in range(4)], own.randrange(2, 8))
    count = own.randrange(1, len(cells))
    for n, (x, y) in enumerate(cells):
        left, top = 8 * x + own.randrange(1, 3), 8 * y + own.randrange(1, 3)
        brush.ellipse((left, top, left + 5, top + 5), fill=COLORS[colors[n >= count]])
    numbers = zip(colors, (count, len(cells) - count), strict=True)
    return [("count", f"how many {color} spots are there", str(number)) for color, number in numbers]


def _one(own: random.Random, brush: Any) -> list[tuple[str, str, str]]:
    shape, color = own.choice(SHAPES), own.choice(list(COLORS))
    _shape(brush, shape, (own.randrange(0, 16), own.randrange(0, 16)), COLORS[color])
    return [("shape", "what shape is the thing", shape), ("color", "what color is the thing", color)]


def _two(own: random.Random, brush: Any) -> list[tuple[str, str, str]]:
    (one, two), (color, other) = own.sample(SHAPES, 2), own.sample(list(COLORS), 2)
    across, first = own.random() < 0.5, own.random() < 0.5
    for n, (shape, tint) in enumerate(((one, color), (two, other))):
        half = 16 * ((n == 0) != first)
        place = (half, own.randrange(0, 16)) if across else (own.randrange(0, 16), half)
        _shape(brush, shape, place, COLORS[tint])
    where = ("left" if first else "right") if across else ("above" if first else "below")
    asked = own.choice(
        [("shape", f"what shape is the {color} thing", one), ("color", f"what color is the {one}", color)]
    )
    return [("place", f"where is the {one} from the {two}", where), asked]


def _shape(brush: Any, shape: str, place: tuple[int, int], color: tuple[int, int, int]) -> None:
    x, y = place[0] + 2, place[1] + 2
    box = (x, y, x + 11, y + 11)
    if shape == "circle":
        brush.ellipse(box, fill=color)
    elif shape == "square":
        brush.rectangle(box, fill=color)
    elif shape == "triangle":
        brush.polygon([(x, y + 11), (x + 5, y), (x + 11, y + 11)], fill=color)
    elif shape == "ring":
        brush.ellipse(box, outline=color, width=3)
    elif shape == "bar":
        brush.rectangle((x, y + 4, x + 11, y + 7), fill=color)
    else:
        brush.rectangle((x + 4, y, x + 7, y + 11), fill=color)
        brush.rectangle((x, y + 4, x + 11, y + 7), fill=color)


class ShapesProcessor:
    """Makes what the model is given from images and text, as processors of transformers do: an image becomes 16 tokens.

    Args:
        image_processor: cuts images into patches.
        tokenizer: of the model.
    """

    image_token = IMAGE

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ShapesProcessor:
        return cls(Glm4vImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def __call__(
        self, images: Sequence[Image.Image] | None, text: str | list[str], return_tensors: str = "pt"
    ) -> dict[str, torch.Tensor]:
        made = dict(self.image_processor(images=list(images), return_tensors="pt")) if images else {}
        counts = [int(grid.prod()) // self.image_processor.merge_size**2 for grid in made.get("image_grid_thw", ())]
        left, texts = iter(counts), []
        for own in [text] if isinstance(text, str) else text:
            pieces = own.split(IMAGE)
            marks = [f"{START} {f'{IMAGE} ' * next(left)}{END} " for _ in pieces[1:]]
            texts.append("".join(piece + mark for piece, mark in zip(pieces, [*marks, ""], strict=True)))
        found = self.tokenizer(texts, return_tensors="pt", padding=True)
        kinds = (found["input_ids"] == self.image_token_id).to(torch.int64)
        return {**found, **made, "mm_token_type_ids": kinds}


def prompt(sample: dict[str, Any]) -> str:
    """The text that the model completes."""
    return f"{IMAGE} {sample['question']} ?"


def row(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample as a row for calibration."""
    return {"image": sample["image"], "text": f"{sample['question']} ? {sample['answer']}"}


@torch.no_grad()
def predict(
    model: Any, processor: ShapesProcessor, samples: Sequence[dict[str, Any]], batch: int = 64
) -> torch.Tensor:
    """Logits [N, V] of the words that follow the questions."""
    found = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        inputs = processor([s["image"] for s in part], [prompt(s) for s in part])
        logits = model(**inputs, use_cache=False).logits
        last = inputs["attention_mask"].sum(-1) - 1
        found.append(logits[torch.arange(len(part)), last].to(torch.float32))
    return torch.cat(found)


def accuracy(logits: torch.Tensor, processor: ShapesProcessor, samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of right answers, of all and by kind."""
    wanted = torch.tensor([processor.tokenizer.convert_tokens_to_ids(s["answer"]) for s in samples])
    right = (logits.argmax(-1) == wanted).to(torch.float64)
    kinds = {kind: torch.tensor([s["kind"] == kind for s in samples]) for kind in KINDS}
    return {"all": float(right.mean())} | {kind: float(right[own].mean()) for kind, own in kinds.items() if own.any()}
