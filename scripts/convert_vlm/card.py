"""The model card of an exported folder, README.md: what the hub reads at its top, and what people read below.

Nothing in it is claimed. Languages, data, base model and questions come from the JSON of the weights, scores from the
files that scoring with `eval_vlm.py` wrote next to them. What is not known is left out.
"""

import json
import re
import shlex
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import EvalResult, ModelCardData
from PIL import Image

from inference.generate import ask, user_turn
from inference.scoring import count_parameters
from model.export import has_eyes
from model.files import read_json
from model.rgb import to_rgb
from scripts.download.tasks import ENCODERS, MODELS, TOKENIZERS

EXAMPLE = "example.png"  # in the folder
LARGEST = 512  # pixels of its longer side
LANGUAGES = {"en": "English", "zh": "Chinese"}
METRICS = {  # of eval_vlm.py: title, how its value is shown
    "exact_match": ("Exact match", "{:.1%}"),
    "bleu": ("BLEU", "{:.1f}"),
    "cider": ("CIDEr", "{:.3f}"),
    "loss": ("Loss per answer token", "{:.3f}"),
}
ENCODER_REPOS = {repo.split("/")[1]: repo for repo in [*ENCODERS.values(), *(each.encoder for each in MODELS.values())]}
ENCODER_WIDTH = 768  # of all of them


# ---------------------------------------------------------------------------- what is known


def data_of(command: str) -> list[str]:
    """The rows that a command of training named."""
    words = shlex.split(command)
    if "--data_path" not in words:
        return []
    paths = words[words.index("--data_path") + 1 :]
    flags = [i for i, word in enumerate(paths) if word.startswith("--")]
    return paths[: flags[0]] if flags else paths


def scores_of(weights: Path, known: list[dict]) -> list[dict]:
    """[{"data": [...], "questions": {language: count}, "true": {language: {metric: value}}, "shuffled": ...}].

    known: those that the JSON of the weights holds already. The others are files next to the weights, as eval_vlm.py
    and the recipes write them. A file that is older than the weights, or of weights in int8, is not about them.
    """
    scores = {tuple(each["data"]): each for each in known}
    files = sorted(weights.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in files:  # of two files about the same data the newer one counts
        result = {}
        with suppress(OSError, ValueError):
            result = read_json(path)
        if not isinstance(result, dict) or not {"weights", "command", "questions", "true", "shuffled"} <= result.keys():
            continue
        if Path(result["weights"]).name != weights.name or "--int8" in result["command"].split():
            continue
        if path.stat().st_mtime < weights.stat().st_mtime:
            print(f"{path} is older than the weights: the model card leaves its scores out")
        elif data := data_of(result["command"]):
            scores[tuple(data)] = {"data": data} | {key: result[key] for key in ("questions", "true", "shuffled")}
    return [*scores.values()]


def base_models(model, tokenizer_sha256: str, encoder_path, known: dict) -> list[str]:
    """Names on Hugging Face of what the weights were made of: those that the JSON holds already; the encoder, if its
    folder has a public name; the public model, if weights without a JSON have its tokenizer and its width."""
    if known.get("base_model"):
        return known["base_model"]
    names = []
    for public in MODELS.values():
        same = TOKENIZERS.get(f"{public.words}/tokenizer.json") == tokenizer_sha256
        if same and public.hidden == model.config.hidden_size and not known.get("command"):
            names.append(public.weights)
    repo = ENCODER_REPOS.get(Path(encoder_path or "").name)
    if repo and has_eyes(model) and model.config.ve_hidden_size == ENCODER_WIDTH:
        names.append(repo)
    return names


def languages_of(info: dict) -> list[str]:
    """Those of the questions that the weights know, and of their scores."""
    of_prompts = [key.split()[0] for key in info.get("prompts") or {}]
    of_scores = [key for scores in info.get("scores", []) for key in scores["questions"]]
    return [key for key in LANGUAGES if key in {*of_prompts, *of_scores}]


def make_example(folder: Path, model, tokenizer, picture: Image.Image, prompt: str, info: dict) -> str:
    """Saves the picture in the folder, in small, and returns the answer of the model to the question about it."""
    picture = to_rgb(picture).copy()
    picture.thumbnail((LARGEST, LARGEST))
    picture.save(folder / EXAMPLE)
    args = SimpleNamespace(greedy=True, temperature=1, top_p=1, dtype="float32", max_new_tokens=64)
    turn = {"role": "user", "content": user_turn(prompt, 1, bool(info.get("pictures_first")))}
    return " ".join(ask(model, tokenizer, [turn], [picture], args).split())


# ---------------------------------------------------------------------------- for the hub


def metrics_of(scores: dict, language: str) -> dict[str, tuple[float, float]]:
    """{metric: (with the true pictures, shuffled)}. Of captions nobody expects an exact match."""
    true, shuffled = scores["true"][language], scores["shuffled"][language]
    known = [key for key in METRICS if key in true and key in shuffled]
    return {key: (true[key], shuffled[key]) for key in known if key != "exact_match" or "cider" not in true}


def eval_results(task: str, all_scores: list[dict]) -> list[EvalResult]:
    """Each metric twice: with the true pictures, and as a control with the pictures shuffled between rows."""
    results = []
    for scores in all_scores:
        paths = scores["data"]
        for language, count in scores["questions"].items():
            for key, values in metrics_of(scores, language).items():
                for value, suffix, note in zip(values, ("", "_shuffled"), ("", ", pictures shuffled (control)")):
                    results.append(
                        EvalResult(
                            task_type=task,
                            dataset_type=re.sub(r"\W+", "-", "-".join(paths)).strip("-"),
                            dataset_name=f"{', '.join(Path(path).name for path in paths)}, "
                            f"{LANGUAGES.get(language, language)}, {count:,} questions",
                            dataset_config=language,
                            metric_type=key + suffix,
                            metric_name=METRICS[key][0] + note,
                            metric_value=round(value, 4),
                        )
                    )
    return results


def front_matter(name: str, task: str, info: dict, widget: dict) -> str:
    """YAML for the hub, without the lines around it."""
    found = re.findall(r"hf://datasets/([\w.-]+/[\w.-]+)", " ".join(map(str, info.get("data") or [])))
    results = eval_results(task, info.get("scores", []))
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        license="apache-2.0",
        language=info.get("languages") or None,
        base_model=info.get("base_model") or None,
        datasets=[*dict.fromkeys(found)] or None,
        tags=["minimind-v"],
        model_name=name if results else None,
        eval_results=results or None,
        widget=[widget],
    ).to_yaml()


# ---------------------------------------------------------------------------- for people


def scores_section(all_scores: list[dict]) -> str:
    """A table, and how to read it."""
    lines = [
        "",
        "## Scores",
        "",
        "| data | language | questions | | true pictures | shuffled |",
        "|---|---|---|---|---|---|",
    ]
    for scores in all_scores:
        data = ", ".join(f"`{path}`" for path in scores["data"])
        for language, count in scores["questions"].items():
            for key, values in metrics_of(scores, language).items():
                title, show = METRICS[key]
                cells = [data, LANGUAGES.get(language, language), f"{count:,}", title, *map(show.format, values)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Measured by `python eval_vlm.py` on the weights before this export, which answers the same. In the last",
            "column each question comes with the pictures of another row: a model that does not look loses nothing.",
            "",
        ]
    )


def model_card(kind: str, name: str, model, info: dict, prompts: list[str], answer: str = "") -> str:
    """kind: of the export; prompts: questions that the model knows, the first one for the example, none of a language
    model alone; answer: what it said to that one about EXAMPLE."""
    config, eyes = model.config, has_eyes(model)
    counts = count_parameters(model) if eyes else {"llm": sum(weight.numel() for weight in model.parameters())}
    experts = f", {config.n_routed_experts} experts of which {config.num_experts_per_tok} work"
    size = f"{config.num_hidden_layers} layers, {config.hidden_size} wide{experts if config.use_moe else ''}"
    trust = ", trust_remote_code=True" if kind == "transformers" else ""
    stock = {"llava": "stock LLaVA", "llm": "stock language model"}.get(kind)
    what = f"{stock}, which needs no code of its own" if stock else "with its code in this repository"
    facts = {"Base model": ", ".join(info.get("base_model", [])), "Stage": info.get("stage")}
    facts |= {"Data": ", ".join(map(str, info.get("data") or [])), "Questions it knows": " · ".join(prompts)}
    facts["Languages"] = ", ".join(LANGUAGES[key] for key in info.get("languages", []))
    facts |= {"Steps": info.get("step"), "Rows": info.get("rows"), "Seed": info.get("seed")}
    facts |= {"Command": f"`python {info['command']}`" if info.get("command") else None}
    facts |= {"Versions": ", ".join(f"{key} {value}" for key, value in info["versions"].items())}
    table = "".join(f"| {key} | {value} |\n" for key, value in facts.items() if value not in (None, ""))
    parameters, example = f"| language model | {counts['llm']:,} ({size}) |\n", ""
    if eyes:
        task, does = "image-text-to-text", "looks at pictures and answers questions about them"
        parameters += f"| projector | {counts['projector']:,} |\n"
        parameters += f"| vision encoder, frozen | {counts['encoder']:,} ({len(config.image_ids)} tokens a picture) |\n"
        picture, text = {"type": "image", "path": "photo.jpg"}, {"type": "text", "text": prompts[0]}
        question = [picture, text] if info.get("pictures_first") else [text, picture]
        widget = {"text": prompts[0], "src": EXAMPLE} | ({"output": {"text": answer}} if answer else {})
        example = f"\n![A picture to ask about]({EXAMPLE})\n\n    {prompts[0]}\n    {answer}\n" if answer else ""
    else:
        task, does, question = "text-generation", "answers in a chat, and sees no pictures", "Who are you?"
        widget = {"messages": [{"role": "user", "content": question}]}
    argument = "text" if eyes else "text_inputs"
    serve = "\nAs a server with OpenAI's interface: `transformers serve` (README of MiniMind-V).\n" if not trust else ""
    return f"""\
---
{front_matter(name, task, info, widget)}
---
# {name}

A small {"vision-" * eyes}language model, made with MiniMind-V: {what}. It {does}.
{example}
| parameters | |
|---|---|
{parameters}
## Run

```python
from transformers import pipeline

ask = pipeline("{task}", "{name}"{trust})
question = {json.dumps(question, ensure_ascii=False)}
print(ask({argument}=[{{"role": "user", "content": question}}], return_full_text=False)[0]["generated_text"])
```
{serve}{scores_section(info["scores"]) if info.get("scores") else ""}
## Training

| | |
|---|---|
{table}
## Limits

It knows what its data taught it, and says it without knowing whether it is true. Do not rely on its answers.

## Licence

Apache-2.0, as the code of MiniMind-V. If your data or the weights you started from ask for another licence, change it
here and at the top of this file.
"""
