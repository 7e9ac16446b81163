"""Scores answers and tests whether the model looks: every metric is computed with the pictures of the rows, and again
with pictures shuffled between rows. A model that only knows typical captions loses nothing by the shuffle.
"""

import random
import shlex
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import sacrebleu
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from common.devices import pick_dtype
from common.files import write_json
from dataset.batches import StepSampler, collate
from dataset.cider import cider, words
from dataset.lm_dataset import VLMDataset
from dataset.references import check_references, read_references
from dataset.rows import Row
from dataset.shapes import ReadOptions
from dataset.values import BadRow
from inference.generate import answer_batches, collate_prompts
from model.files import read_json
from model.generations import without_thoughts
from model.int8 import Int8Linear
from model.packed import PackedLinear
from model.processing import encode_chat, language
from model.weights import bare_name
from trainer.loader import ignore_interrupt
from trainer.loop import validate

CAPTION = 5  # if references average this many words (characters in Chinese), they are captions: BLEU and CIDEr apply


# ---------------------------------------------------------------------------- text


def exact_match(answer: str, references: list[str]) -> bool:
    """Whether the answer has the same words in the same order as a reference, ignoring case and punctuation."""
    return any(words(answer) == words(reference) for reference in references)


def bleu(answers: list[str], references: list[list[str]], zh: bool) -> float:
    """Returns the sacreBLEU score of a corpus, 0 to 100."""
    most = max(map(len, references))
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    return sacrebleu.corpus_bleu(answers, streams, lowercase=True, tokenize="zh" if zh else "13a").score


# ---------------------------------------------------------------------------- rows as questions


@dataclass
class Question:
    """An answer to generate. Its prompt contains all earlier turns as they are in the data."""

    row: int
    prompt: list[int]  # input_ids up to the start of the answer
    pictures: int  # number of pictures in the prompt
    images: list[str]  # their names
    text: str  # the last user turn
    references: list[str]
    tokens: int  # of the answer in the data
    kind: str  # "kind" of its row, one for all turns or a list, as drawn scenes have it: "colour"; "" without one

    @property
    def language(self) -> str:
        return language(self.references[0])


def with_others(data: VLMDataset, each_row: bool):
    """Yields (number, row, the other rows of its group), for each row or for the first of each group."""
    firsts = range(len(data)) if data.groups is None else data.groups.tolist()
    for first, end in zip(firsts, [*firsts[1:], len(data)]):
        group = [data.row(row) for row in range(first, end)]
        for number, row in enumerate(group if each_row else group[:1], first):
            yield number, row, [other for other in group if other is not row]


def questions_of(data: VLMDataset, captions: dict[str, list[str]], each_row: bool = False) -> list[Question]:
    """Makes a question for each assistant turn. captions: {name of a picture: further references in any language}. If a
    picture has several captions, it is asked about once, or with `each_row` once for each; all are references."""
    questions = []
    for row, example, others in with_others(data, each_row):
        others = [other.conversations[-1]["content"] for other in others]
        conversations, images, kind = example.conversations, example.images, example.kind
        pieces = encode_chat(data.tokenizer, conversations, data.image_ids)
        answers = [without_thoughts(turn["content"]) for turn in conversations if turn["role"] == "assistant"]
        kinds = [*map(str, kind), *[""] * len(answers)] if isinstance(kind, list) else [str(kind)] * len(answers)
        users = [turn["content"] for turn in conversations if turn["role"] == "user"]
        ids, pictures = [], 0
        for turn, (prompt, answer) in enumerate(zip(pieces[:-1:2], pieces[1::2])):
            ids, pictures = ids + prompt[0], pictures + prompt[2]
            if len(ids) >= data.max_length:
                break
            references = [answers[turn]]
            more = (
                captions.get(images[0], captions.get(Path(images[0]).name, []))
                if len(images) == len(answers) == 1
                else []
            )
            more = [*others, *more]
            references += [text for text in more if language(text) == language(answers[turn])]
            references = list(dict.fromkeys(references))
            shown, tokens = images[:pictures], len(answer[0])
            questions.append(Question(row, ids, pictures, shown, users[turn], references, tokens, kinds[turn]))
            ids = ids + answer[0]
    return questions


class ShuffledPictures(VLMDataset):
    """The same rows with the pictures of other rows, as many per row as before.

    Pictures are exchanged, not rows: two rows about one picture get the same new picture, from the same file. A row
    keeps its own pictures only if no other row has the same number. Raises ValueError if nothing can be exchanged.
    """

    def __init__(self, data: VLMDataset, seed: int):
        vars(self).update(vars(data))  # the rows are checked already
        names = {}
        for row in range(len(data)):
            images = data.row(row).images
            names[self.pictures_key(row, images)] = images
        self.other = {}
        for source, count in sorted({(key[0], len(key) - 1) for key in names if len(key) > 1}):
            alike = sorted(key for key in names if key[0] == source and len(key) == count + 1)
            random.Random(seed).shuffle(alike)
            self.other |= {key: names[other] for key, other in zip(alike, alike[1:] + alike[:1]) if key != other}
        if not self.other:
            raise ValueError(
                "--data_path has no two different pictures to exchange, which would test whether the model looks.\n"
                "Add a row with another picture, or ask about a picture with --image"
            )

    def pictures_key(self, row: int, images: list[str]) -> tuple:
        """Returns a key for the pictures of a row: its source and the identity of each picture."""
        source = self.locate(row)[0]
        return source, *map(self.sources[source].identity, images)

    def row(self, row: int) -> Row:
        """Returns a row as it is in its file, except for the names of its pictures."""
        example = super().row(row)
        return replace(example, images=self.other.get(self.pictures_key(row, example.images), example.images))


# ---------------------------------------------------------------------------- scores


class Prompts(Dataset):
    """Questions as examples for `collate_prompts`: prompts without answers, with their pictures from `rows`."""

    def __init__(self, questions: list[Question], rows: VLMDataset):
        self.questions, self.rows = questions, rows

    def __len__(self) -> int:
        return len(self.questions)

    def images(self, i: int) -> list[str]:
        """Returns the names of the pictures of question i."""
        question = self.questions[i]
        return self.rows.row(question.row).images[: question.pictures]

    def __getitem__(self, i: int) -> dict:
        question = self.questions[i]
        try:
            pictures = [self.rows.load_picture(question.row, name) for name in self.images(i)]
        except BadRow as error:
            return {"number": i, "broken": f"{self.rows.where(question.row)}: {error}"}
        return {"number": i, "ids": question.prompt, "pictures": torch.stack(pictures) if pictures else None}


def load_by_length(data: Dataset, lengths, collate_fn, tokenizer, args) -> DataLoader:
    """Returns a loader of batches whose rows have similar lengths, shortest first."""
    return DataLoader(
        data,
        batch_sampler=StepSampler(lengths, args.batch_size, shuffle=False),
        collate_fn=partial(collate_fn, pad_token_id=tokenizer.pad_token_id),
        num_workers=args.num_workers,
        worker_init_fn=ignore_interrupt,
    )


def answer_all(model, tokenizer, prompts: Prompts, args, device, dtype, title: str) -> list[str]:
    """Returns greedy answers to all questions, "" for broken pictures. Raises ValueError for the first broken picture
    unless --on_bad_row is skip."""
    questions = prompts.questions
    # Sorted first by the rough length of the expected answer: a batch runs until its longest answer ends.
    lengths = [10**6 * question.tokens.bit_length() + len(question.prompt) for question in questions]
    loader = load_by_length(prompts, lengths, collate_prompts, tokenizer, args)
    answers = [""] * len(questions)
    with tqdm(total=len(questions), desc=title, unit="answer", dynamic_ncols=True) as bar:
        for texts, broken in answer_batches(model, tokenizer, loader, args, device, dtype):
            if broken and args.on_bad_row == "error":
                why = next(iter(broken.values()))
                raise ValueError(f"{why}\nFix it, or count it as unanswered with --on_bad_row skip")
            for number, text in texts.items():
                answers[number] = text
            bar.update(len(texts) + len(broken))
    return answers


def compute_metrics(questions: list[Question], answers: list[str]) -> dict:
    """Returns exact match (0 to 1), and for captions also BLEU (0 to 100) and CIDEr, of answers in one language."""
    references = [question.references for question in questions]
    scores = {"exact_match": sum(map(exact_match, answers, references)) / len(answers)}
    if sum(len(words(texts[0])) for texts in references) / len(references) >= CAPTION:
        scores["bleu"] = bleu(answers, references, questions[0].language == "zh")
        scores["cider"] = fmean(cider(answers, references))
    return scores


def by_kind(answers: list[dict]) -> dict:
    """Returns {kind: {"en": {"questions": 40, "true": 0.9, "shuffled": 0.2}, "zh": ...}}: shares of exact matches,
    kinds in alphabetical order; empty if the rows name no kinds. answers: from `score`."""
    groups = {}
    for answer in answers:
        if answer["kind"]:
            groups.setdefault(answer["kind"], {}).setdefault(answer["language"], []).append(answer)

    def share_right(group):
        right, shuffled = (sum(answer[key] for answer in group) for key in ("right", "right_shuffled"))
        return {"questions": len(group), "true": right / len(group), "shuffled": shuffled / len(group)}

    return {
        kind: {key: share_right(group) for key, group in sorted(languages.items())}
        for kind, languages in sorted(groups.items())
    }


def score(model, tokenizer, data: VLMDataset, captions, args, device, dtype) -> dict:
    """Returns {"true": {"en": {...}, "zh": {...}}, "shuffled": ..., "by_kind": ..., "answers": [...]}.

    "true" and "shuffled" contain the metrics of `compute_metrics` and, unless args.no_loss, "loss" (nats); "by_kind" is
    from `by_kind`. captions: {name of a picture: further references}.
    """
    questions = questions_of(data, captions)
    by_language = {}
    for i, question in enumerate(questions):
        by_language.setdefault(question.language, []).append(i)
    result = {"questions": {key: len(numbers) for key, numbers in by_language.items()}}
    asked = {"true": Prompts(questions, data), "shuffled": Prompts(questions, ShuffledPictures(data, args.seed))}
    given = {}
    for which, prompts in asked.items():
        given[which] = answer_all(model, tokenizer, prompts, args, device, dtype, f"{which} pictures")
        result[which] = {}
        for key, numbers in sorted(by_language.items()):
            result[which][key] = compute_metrics([questions[i] for i in numbers], [given[which][i] for i in numbers])
            if args.no_loss:
                continue
            chosen = sorted({questions[i].row for i in numbers})
            loader = load_by_length(Subset(prompts.rows, chosen), data.lengths[chosen], collate, tokenizer, args)
            result[which][key]["loss"] = validate(model, loader, device, dtype)
    answers = [
        {
            "kind": question.kind,
            "language": question.language,
            "images": question.images,
            "question": question.text,
            "references": question.references,
            "answer": given["true"][i],
            "right": exact_match(given["true"][i], question.references),
            "images_shuffled": asked["shuffled"].images(i),
            "answer_shuffled": given["shuffled"][i],
            "right_shuffled": exact_match(given["shuffled"][i], question.references),
        }
        for i, question in enumerate(questions)
    ]
    return result | {"by_kind": by_kind(answers), "answers": answers}


def scores_table(result: dict) -> str:
    """Formats what `score` returns for a terminal."""
    titles = {"exact_match": "exact match", "bleu": "BLEU", "cider": "CIDEr", "loss": "loss per answer token"}
    lines = [f"{'':34}{'true pictures':>15}{'shuffled':>12}"]
    for key, metrics in result["true"].items():
        for metric, value in metrics.items():
            other = result["shuffled"][key][metric]
            show = "{:.1%}" if metric == "exact_match" else "{:.1f}" if metric == "bleu" else "{:.3f}"
            label = f"{key} ({result['questions'][key]:,}): {titles[metric]}"
            lines.append(f"{label:34}{show.format(value):>15}{show.format(other):>12}")
    if result["by_kind"]:
        lines += ["", *kinds_table(result["by_kind"])]
    return "\n".join(lines)


def kinds_table(kinds: dict) -> list[str]:
    """Formats exact match by kind of question, one column per language: first with true pictures, then shuffled."""
    languages = sorted({key for cells in kinds.values() for key in cells})
    lines = [f"{'exact match':14}{'questions':>10}" + "".join(f"{key:>9}" for key in languages)]
    lines[0] += "".join(f"{'shuffled ' + key:>14}" for key in languages)
    for kind, cells in kinds.items():
        line = f"{kind:14}{sum(cell['questions'] for cell in cells.values()):>10,}"
        for which, width in (("true", 9), ("shuffled", 14)):
            shares = [f"{cells[key][which]:.1%}" if key in cells else "-" for key in languages]
            line += "".join(f"{share:>{width}}" for share in shares)
        lines.append(line)
    return lines


def count_parameters(model) -> dict[str, int]:
    """Returns the number of parameters of "llm", "projector" and "encoder"."""
    parts = {"projector": model.vision_proj, "encoder": model.vision_encoder}
    counts = {name: size(part) for name, part in parts.items()}
    return {"llm": size(model) - sum(counts.values())} | counts


def size(part) -> int:
    """Counts parameters and the weights that layers for answers keep as other tensors."""
    weights, lm_head = [*part.parameters()], getattr(part, "lm_head", None)  # lm_head is embed_tokens
    for layer in part.modules():
        if isinstance(layer, (Int8Linear, PackedLinear)) and layer is not lm_head:
            weights += [layer.weight] if getattr(layer, "bias", None) is None else [layer.weight, layer.bias]
    return sum(weight.numel() for weight in weights)


def score_rows(model, tokenizer, args, weights: Path, device) -> dict:
    """Scores the rows of --data_path. Prints a table, writes scores and answers to --output, and returns them.

    Raises ValueError for rows or flags that do not fit.
    """
    captions = read_references(args.refs_path)
    data = VLMDataset(
        args.data_path,
        args.images_path,
        tokenizer,
        model.processor,
        args.max_seq_len,
        model.config.image_ids,
        args.on_bad_row,
        options=ReadOptions(tuple(filter(None, [args.prompt])), allow_urls=args.allow_urls),
    )
    if data.bad:
        print(data.report())
    check_references(captions, data)
    if args.prompt and not data.captioned:
        raise ValueError("--prompt is for pictures with captions, and no row has captions: leave it out")
    output = Path(args.output or weights.with_name(f"{bare_name(weights)}.scores.json"))
    # Write the file now: if that fails, fail before an hour of answers. Earlier scores are kept.
    write_json(output, read_json(output) if output.is_file() else {})
    result = score(model, tokenizer, data, captions, args, device, pick_dtype(args.dtype, device))
    run = {
        "weights": str(weights),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": str(device),
        "parameters": count_parameters(model),
    }
    result = run | result
    print(scores_table(result))
    write_json(output, result)
    print(f"scores and all answers: {output}")
    return result
