"""The words of the embedded pipeline: digits, inks, pencil and their phrasings, and a tokenizer for them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = ("black", "red", "green", "blue")
MEDIA = (*INKS, "pencil")
"""The four inks, and pencil: the medium of most digits whose prompt names no medium."""
START, END = "<|startoftext|>", "<|endoftext|>"

FRAMES = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}", "a scan of {}")
DIGIT_NOUNS = ("{}", "a {}", "the digit {}", "the number {}", "a handwritten {}")
GENERIC_NOUNS = ("digit", "a digit", "the digit", "a number", "a handwritten digit")
INK_PHRASES = ("in {} ink", "written in {} ink", "drawn with {} ink")
PENCIL_PHRASES = ("in pencil", "written in pencil", "drawn with pencil")


def medium_phrases(medium: str) -> tuple[str, ...]:
    """Every way the pipeline was taught to name a medium ("red" -> "in red ink", ...)."""
    if medium == "pencil":
        return PENCIL_PHRASES
    return tuple(phrase.format(medium) for phrase in INK_PHRASES)


def all_phrases() -> tuple[str, ...]:
    """The phrases of all media, and the empty one, which names none."""
    return ("", *(phrase for medium in MEDIA for phrase in medium_phrases(medium)))


def prompt(noun: str, frame: str = "a photo of {}", medium_phrase: str = "") -> str:
    """One prompt: ``prompt("the digit three", medium_phrase="in red ink")``."""
    return f"{frame.format(noun)} {medium_phrase}".strip()


def corpus() -> list[str]:
    """Every prompt the pipeline can be given, for the tokenizer's merges."""
    nouns = [noun.format(digit) for noun in DIGIT_NOUNS for digit in DIGITS] + list(GENERIC_NOUNS)
    return [prompt(noun, frame, phrase) for noun in nouns for frame in FRAMES for phrase in all_phrases()]


def learn_tokenizer(corpus: list[str], max_length: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer with CLIP's conventions, whose tokens are the words of ``corpus``.

    Args:
        corpus: prompts.
        max_length: the most tokens of a prompt, with start and end.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    learner.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    with tempfile.TemporaryDirectory() as folder:  # in the files of CLIP's published tokenizers
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)
