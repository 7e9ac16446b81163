"""How good are the answers, and does the model look at all? Every figure twice: with the pictures of the rows, and
with the pictures shuffled between rows. A model that only knows what captions usually say loses nothing by that.
"""

import random
import re
from dataclasses import dataclass
from functools import partial

import sacrebleu
import torch
from pycocoevalcap.cider.cider import Cider
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from dataset.lm_dataset import BadRow, StepSampler, VLMDataset, collate, parse_row
from model.processing import encode_chat
from trainer.cli import autocast
from trainer.loop import validate

CAPTION = 5  # references of as many words (characters in Chinese), on average, are captions: BLEU and CIDEr


# ---------------------------------------------------------------------------- text


def language(text: str) -> str:
    return "zh" if re.search("[\u3400-\u9fff]", text) else "en"


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; Chinese by character."""
    return re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+(?:'\w+)?", text.lower())


def exact_match(answer: str, references: list[str]) -> bool:
    """The same words in the same order as one of the references; case and punctuation do not count."""
    return any(words(answer) == words(reference) for reference in references)


def bleu(answers: list[str], references: list[list[str]], zh: bool) -> float:
    """sacreBLEU of a corpus, 0 to 100."""
    most = max(map(len, references))
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    return sacrebleu.corpus_bleu(answers, streams, lowercase=True, tokenize="zh" if zh else "13a").score


def cider(answers: list[str], references: list[list[str]]) -> float:
    """CIDEr-D of a corpus (Vedantam et al. 2015), on `words`; weights of n-grams from these references."""
    given = {i: [" ".join(words(reference)) for reference in own] for i, own in enumerate(references)}
    score, _ = Cider().compute_score(given, {i: [" ".join(words(answer))] for i, answer in enumerate(answers)})
    return float(score)


# ---------------------------------------------------------------------------- rows as questions


@dataclass
class Question:
    """An answer to give: all turns before it as they stand in the data."""

    row: int
    prompt: list[int]  # input_ids up to where the answer begins
    pictures: int  # how many the prompt shows
    images: list[str]  # their names
    text: str  # the last user turn
    references: list[str]

    @property
    def language(self) -> str:
        return language(self.references[0])


def questions_of(data: VLMDataset, captions: dict[str, list[str]]) -> list[Question]:
    """A question for each assistant turn. captions: more references, by name of the picture, any language."""
    questions = []
    for row in range(len(data)):
        conversations, images = parse_row(data.line(row))
        pieces = encode_chat(data.tokenizer, conversations, data.placeholders)
        answers = [turn["content"] for turn in conversations if turn["role"] == "assistant"]
        users = [turn["content"] for turn in conversations if turn["role"] == "user"]
        ids, pictures = [], 0
        for turn, (prompt, answer) in enumerate(zip(pieces[:-1:2], pieces[1::2])):
            ids, pictures = ids + prompt[0], pictures + prompt[2]
            if len(ids) >= data.max_length:
                break
            references = [answers[turn]]
            more = captions.get(images[0], []) if len(images) == 1 and len(answers) == 1 else []
            references += [text for text in more if language(text) == language(answers[turn]) and text != answers[turn]]
            questions.append(Question(row, ids, pictures, images[:pictures], users[turn], references))
            ids = ids + answer[0]
    return questions


class ShuffledPictures(Dataset):
    """The same rows with the pictures of others; as many as before.

    Pictures are exchanged, not rows: two rows about one picture both get the same other one. Only a row that is alone
    in its number of pictures keeps its own.
    """

    def __init__(self, data: VLMDataset, seed: int):
        self.data = data
        self.images = [parse_row(data.line(row))[1] for row in range(len(data))]
        self.other = {}
        for count in {len(names) for names in self.images} - {0}:
            distinct = sorted({tuple(names) for names in self.images if len(names) == count})
            random.Random(seed).shuffle(distinct)
            self.other |= dict(zip(distinct, distinct[1:] + distinct[:1]))
        if all(own == other for own, other in self.other.items()):
            raise ValueError("the rows have no two different pictures to exchange, so looking cannot be tested")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> dict:
        example = self.data[row]
        if example.get("pictures") is None:
            return example
        shown = self.other[tuple(self.images[row])][: len(example["pictures"])]
        try:
            return example | {"pictures": torch.stack([self.data.load_picture(name) for name in shown])}
        except BadRow as error:
            return {"row": row, "broken": f"{self.data.where(row)}, shuffled: {error}"}


# ---------------------------------------------------------------------------- scores


class Prompts(Dataset):
    """Questions as examples: prompts without answers, with the pictures that `rows` gives them."""

    def __init__(self, questions: list[Question], rows: Dataset):
        self.questions, self.rows = questions, rows

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, i: int) -> dict:
        question = self.questions[i]
        example = self.rows[question.row]
        if "broken" in example:
            return {"number": i} | example
        return {
            "number": i,
            "ids": question.prompt,
            "pictures": example["pictures"][: question.pictures] if question.pictures else None,
        }


def collate_prompts(examples: list[dict], pad_token_id: int) -> dict:
    """Prompts padded on the left, so that all answers begin at the same position; "broken": why others are missing."""
    broken = [example["broken"] for example in examples if "broken" in example]
    examples = [example for example in examples if "broken" not in example]
    if not examples:
        return {"numbers": [], "broken": broken}
    T = max(len(example["ids"]) for example in examples)
    input_ids, mask = torch.full((len(examples), T), pad_token_id), torch.zeros((len(examples), T), dtype=torch.int64)
    for i, example in enumerate(examples):
        n = len(example["ids"])
        input_ids[i, T - n :], mask[i, T - n :] = torch.tensor(example["ids"]), 1
    pictures = [example["pictures"] for example in examples if example["pictures"] is not None]
    return {
        "numbers": [example["number"] for example in examples],
        "broken": broken,
        "input_ids": input_ids,
        "attention_mask": mask,
        "pixel_values": torch.cat(pictures) if pictures else None,
    }


@torch.no_grad()
def answer_all(model, tokenizer, questions, rows: Dataset, args, device, dtype, title: str) -> list[str]:
    """Greedy answers to all questions, in batches of like length."""
    loader = DataLoader(
        Prompts(questions, rows),
        batch_sampler=StepSampler([len(question.prompt) for question in questions], args.batch_size, shuffle=False),
        collate_fn=partial(collate_prompts, pad_token_id=tokenizer.pad_token_id),
        num_workers=args.num_workers,
    )
    answers = [""] * len(questions)
    with tqdm(total=len(questions), desc=title, unit="answer", dynamic_ncols=True) as bar:
        for batch in loader:
            if batch["broken"] and args.on_bad_row == "error":
                raise ValueError(f"{batch['broken'][0]}\nMend it, or count it as not answered with --on_bad_row skip")
            bar.update(len(batch["broken"]))
            if not batch["numbers"]:
                continue
            pixels = batch["pixel_values"]
            with autocast(device, dtype):
                out = model.generate(
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                    pixel_values=None if pixels is None else pixels.to(device),
                    max_new_tokens=args.max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for number, text in zip(batch["numbers"], texts):
                answers[number] = text.strip()
            bar.update(len(texts))
    return answers


def figures(questions: list[Question], answers: list[str]) -> dict:
    """Exact match (0 to 1), and for captions BLEU (0 to 100) and CIDEr, of one language."""
    references = [question.references for question in questions]
    scores = {"exact_match": sum(map(exact_match, answers, references)) / len(answers)}
    if sum(len(words(own[0])) for own in references) / len(references) >= CAPTION:
        scores["bleu"] = bleu(answers, references, questions[0].language == "zh")
        scores["cider"] = cider(answers, references)
    return scores


def score(model, tokenizer, data: VLMDataset, captions, args, device, dtype) -> dict:
    """{"true": {"en": {...}, "zh": {...}}, "shuffled": ..., "answers": [...]}; see `figures`, and "loss" (nats).

    captions: {name of a picture: further references}.
    """
    questions = questions_of(data, captions)
    by_language = {}
    for i, question in enumerate(questions):
        by_language.setdefault(question.language, []).append(i)
    result = {"questions": {key: len(found) for key, found in by_language.items()}}
    given = {}
    for kind, rows in (("true", data), ("shuffled", ShuffledPictures(data, args.seed))):
        given[kind] = answer_all(model, tokenizer, questions, rows, args, device, dtype, f"{kind} pictures")
        result[kind] = {}
        for key, found in sorted(by_language.items()):
            chosen = sorted({questions[i].row for i in found})
            loader = DataLoader(
                Subset(rows, chosen),
                batch_sampler=StepSampler(data.lengths[chosen], args.batch_size, shuffle=False),
                collate_fn=partial(collate, pad_token_id=tokenizer.pad_token_id),
                num_workers=args.num_workers,
            )
            result[kind][key] = figures([questions[i] for i in found], [given[kind][i] for i in found])
            result[kind][key]["loss"] = validate(model, loader, device, dtype)
    result["answers"] = [
        {
            "images": question.images,
            "question": question.text,
            "references": question.references,
            "answer": given["true"][i],
            "answer_shuffled": given["shuffled"][i],
        }
        for i, question in enumerate(questions)
    ]
    return result


def table(result: dict) -> str:
    """The figures of `score` for a terminal."""
    titles = {"exact_match": "exact match", "bleu": "BLEU", "cider": "CIDEr", "loss": "loss per answer token"}
    lines = [f"{'':34}{'true pictures':>15}{'shuffled':>12}"]
    for key, found in result["true"].items():
        for metric, value in found.items():
            other = result["shuffled"][key][metric]
            show = "{:.1%}" if metric == "exact_match" else "{:.1f}" if metric == "bleu" else "{:.3f}"
            label = f"{key} ({result['questions'][key]:,}): {titles[metric]}"
            lines.append(f"{label:34}{show.format(value):>15}{show.format(other):>12}")
    return "\n".join(lines)
