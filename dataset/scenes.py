"""The built-in picture world: small scenes of coloured shapes, with conversations about them in English and Chinese.

    python -m dataset.scenes --out_dir out/scenes --scenes 12000 --seed 0

Data for a model that starts from nothing, without any download. It writes what any data set of this repo consists of,
{train,val,val_wording,val_new}.jsonl and images/ in out_dir, so that everything that reads them is the ordinary path:

    {"conversations": [{"role": "user", "content": "<image>\\nWhat colour is the star?"},
                       {"role": "assistant", "content": "the star is purple"}],
     "image": "val_new_00007.jpg", "kind": "colour", "lang": "en"}

* `kind` (of a conversation: of each question) and `lang` are there to split scores by; the reader leaves them alone.
* One question has one right answer in one form, so that exact match is fair. Where a picture cannot settle a question
  (which of two red circles? is it left of, or just about below?) the question is not asked.
* Among the questions a scene allows, the one whose answer was given least often so far is asked (`used`), so a model
  that never looks scores little: about a fifth (tests/test_scenes.py measures it).
* val holds other scenes of the same kind as train; val_wording asks the same about them, in wordings that train never
  has (`dataset.scene_wordings`). The scenes of val_new have what no picture and no text of train has, a combination of
  colour and shape (NEW_PAIRS) or three of a shape in a corner (`is_new`), and all its questions are about that. Each
  colour and each shape for itself occurs in train.

--form captions writes a caption of every object, for contrastive training, where one in five objects of train is in a
shade that no word is for; --form text writes conversations with the scene in words in place of the picture, for
training on text. With the same seed the scenes are the same. Scenes and their pictures are in
`dataset.scene_pictures`, questions and right answers in `dataset.scene_questions`.
"""

if __spec__ is None:  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m dataset.scenes instead of dataset/scenes.py")

if __name__ == "__main__":
    from common.start import begin

    begin()  # Ctrl-C or a missing package is one sentence from here on

import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dataset.scene_pictures import Scene, draw, random_scene, save_jpeg, without_colour
from dataset.scene_questions import ANSWERS, EACH, LANGS, LOOK_UPS, ask, caption
from dataset.scene_wordings import Words

KINDS = {  # share of rows, as far as scenes allow; "multi" is a conversation of several questions, "each" of lists
    "describe": 6,
    "what": 3,
    "colour": 3,
    "count": 6,
    "where": 3,
    "exists": 3,
    "relation": 5,
    "size": 4,
    "check": 4,
    "multi": 13,
    "compare": 5,
    "greet": 1,
    "blind": 1,
    "each": 5,
}
USUAL = tuple(kind for kind in KINDS if kind != "each")  # that is for practice: all objects looked up, one by one
# Of a conversation; a description would give away the rest.
TURNS = ("what", "colour", "count", "where", "exists", "relation", "size", "check")
LENGTH = (4, 12)  # questions drawn for a conversation; those that cannot be asked, or come twice, fall away

# ---------------------------------------------------------------------------- rows


def rows_of(
    scene, image: str, rng, used: Counter, rows=4, kinds=USUAL, new=False, other=None, lists=LOOK_UPS, style="train"
) -> list[dict]:
    """Conversations about a scene, half of them Chinese, in the format of the module's docstring; `rows` of them, fewer
    where the scene allows fewer.

    Args:
        image: the name of its picture.
        rng: random.Random.
        used: see `ask`; one for a whole split.
        kinds: the keys of KINDS to choose from.
        new: for val_new, ask only about what is_new.
        other: (scene, name of the picture) to compare with; without it there is no "compare".
        lists: the keys of EACH to choose from.
        style: of the wordings, see `Words`. Another one asks the same questions.
    """
    kinds = [kind for kind in kinds if kind != "compare" or other]
    kinds = [kind for kind in kinds if not (new and kind in ANSWERS)]  # they are about nothing
    weights = [KINDS[kind] for kind in kinds]
    words = Words(style, random.Random(repr(scene)))
    chats, meanings, first = [], set(), rng.randrange(2)
    for _ in range(8 * rows if kinds else 0):
        lang = LANGS[(first + len(chats)) % 2]
        kind = rng.choices(kinds, weights)[0]
        pictures, turns = [(scene, image)], [(kind, "")]
        if kind == "compare":
            pictures.insert(rng.randrange(2), other)
        elif kind == "greet" and rng.random() < 0.5:
            pictures = []
        elif kind == "multi":
            turns = [(turn, "") for turn in rng.choices(TURNS, k=rng.randint(*LENGTH))]
        elif kind == "each":
            turns = [(kind, form) for form in rng.sample(lists, min(3, len(lists)))]
        elif kind == "blind":
            turns = [(rng.choice((*TURNS, "describe")), "")]
        switch = len(turns)  # where the other picture comes, which the turns from there on are about
        if kind == "multi" and other and rng.random() < 0.2:
            switch = len(turns) // 2
        asked = {}  # what a question means: kind, question, answer, pictures
        for i, (turn, form) in enumerate(turns):
            shown = pictures if i < switch else [other]
            scenes = [one for one, _ in shown] or [scene]
            if asking := ask(scenes, turn, lang, rng, used, new, words, form):
                meaning, question, answer = asking
                asked.setdefault((*meaning, i < switch, answer), (turn, question, answer, shown))
        if len(asked) < (2 if kind == "multi" else 1) or not meanings.isdisjoint(asked):
            continue
        meanings.update(asked)
        # Lists too, which are easier to learn so; they draw all the same, so that the rows after them stay as are.
        picture_first, messages, names, seen = rng.random() < 0.5 or kind == "each", [], [], []
        for _, question, answer, shown in asked.values():
            if shown != seen and kind != "blind":
                tags = words.between().join(["<image>"] * len(shown))
                names += [picture for _, picture in shown]
                question = words.between().join([tags, question] if picture_first else [question, tags])
            answer, seen = ANSWERS[kind][lang] if kind == "blind" else answer, shown
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        kinds_asked = [turn for turn, *_ in asked.values()] if kind == "multi" else kind
        image_of_row = {"image": ", ".join(names)} if names else {}
        chats.append({"conversations": messages, **image_of_row, "kind": kinds_asked, "lang": lang})
        if len(chats) == rows:
            break
    return chats


def describe_in_words(scene: Scene) -> str:
    """All that can be asked about, in the order of the patches: "picture: topleftbigredstar middlesmallbluering".

    One word for an object, its place and all of its looks, as in a picture a patch is one vector.
    """
    words = [f"{thing.place.replace(' ', '')}{thing.size}{thing.colour}{thing.shape}" for thing in scene.things]
    return " ".join(["picture:", *words])


def captions_of(scene: Scene, image: str) -> list[dict]:
    """For each thing rows in each language that say what it is and where: "a big red star in the middle", and without
    the colour "a star in the middle": an encoder must know a shape in a colour that it never had.
    """
    texts = [
        (lang, caption(replace(scene, things=(thing,)), lang, colour=colour))
        for thing in scene.things
        for colour in ((True, False) if thing.colour else (False,))
        for lang in LANGS
    ]
    return [
        {
            "conversations": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": text}],
            "image": image,
            "kind": "caption",
            "lang": lang,
        }
        for lang, text in texts
    ]


def text_rows_of(
    scene, rng, used, rows=4, kinds=USUAL, new=False, other=None, lists=LOOK_UPS, style="train"
) -> list[dict]:
    """As `rows_of`, with each picture in words instead, so without "image"; other: a scene to compare with."""
    scenes = {"one": scene, "two": other}
    chats = rows_of(scene, "one", rng, used, rows, kinds, new, other and (other, "two"), lists, style)
    for row in chats:
        descriptions = [describe_in_words(scenes[picture]) for picture in row.pop("image", "").split(", ") if picture]
        for turn in row["conversations"][::2]:
            # The word for an object must not grow together with what stands beside it.
            content = re.sub(r"(?<=\S)(?=<image>)|(?<=<image>)(?=\S)", "\n", turn["content"])
            while "<image>" in content:
                content = content.replace("<image>", descriptions.pop(0), 1)
            turn["content"] = content
    return chats


def scenes_of(split: str, count: int, seed: int, objects=(1, 4)) -> Iterator[Scene]:
    """The scenes of "train", "val" or "val_new". Each has its own seed, so more of them leave the first ones as are."""
    for i in range(count):
        yield random_scene(random.Random(f"{seed} {split} {i}"), split == "val_new", objects)


def refuse_to_overwrite(out_dir: Path, splits) -> None:
    """ValueError if rows of one of these splits stand there already."""
    for split in splits:
        if (out_dir / f"{split}.jsonl").exists():
            raise ValueError(
                f"--out_dir {out_dir}: {split}.jsonl is there already. Choose another folder, or remove it"
            )


def write_world(
    out_dir,
    scenes=12000,
    val_scenes=400,
    seed=0,
    image_size=64,
    rows=4,
    kinds=USUAL,
    form="chat",
    objects=(1, 4),
    lists=LOOK_UPS,
    plain=False,
) -> dict:
    """Writes {train,val,val_wording,val_new}.jsonl and images/ into out_dir; returns {split: number of rows}.

    Same arguments, same bytes. Other rows or kinds show the same scenes. The .jsonl stand there only when complete. One
    that stands there already may be somebody's own: ValueError.
    form: "chat", conversations; "text", with scenes in words and without images/; "captions", see `captions_of`.
    plain: each question in its first wording alone; then there is no val_wording, nor is there with captions.
    """
    out_dir = Path(out_dir)
    splits = {"train": scenes, "val": val_scenes, "val_wording": val_scenes, "val_new": val_scenes}
    if plain or form == "captions":
        del splits["val_wording"]
    refuse_to_overwrite(out_dir, splits)
    (out_dir if form == "text" else out_dir / "images").mkdir(parents=True, exist_ok=True)
    written = {}
    for split, count in splits.items():
        of_scenes = "val" if split == "val_wording" else split  # the same pictures and questions in other words
        style = "plain" if plain else "held out" if split == "val_wording" else "train"
        start, used, other, written[split] = time.perf_counter(), Counter(), None, 0
        beside = out_dir / f"{split}.jsonl.tmp"
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            for i, scene in enumerate(scenes_of(of_scenes, count, seed, objects)):
                rng, new = random.Random(f"{seed} {of_scenes} {i} rows"), split == "val_new"
                if form == "text":
                    of_scene = text_rows_of(scene, rng, used, rows, kinds, new, other, lists, style)
                    other = scene
                else:
                    image = f"{of_scenes}_{i:05}.jpg"
                    if form == "captions" and split == "train":
                        scene = without_colour(scene, rng)
                    if split == of_scenes:
                        save_jpeg(draw(scene, image_size), out_dir / "images" / image)
                    if form == "captions":
                        of_scene = captions_of(scene, image)
                    else:
                        of_scene = rows_of(scene, image, rng, used, rows, kinds, new, other, lists, style)
                    other = (scene, image)
                for row in of_scene:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written[split] += len(of_scene)
        rate = count / (time.perf_counter() - start)
        print(f"{out_dir / split}.jsonl: {count:,} scenes, {written[split]:,} rows, {rate:,.0f} scenes/s")
    for split in splits:
        (out_dir / f"{split}.jsonl.tmp").replace(out_dir / f"{split}.jsonl")
    return written


# ---------------------------------------------------------------------------- the run


def check_numbers(args) -> None:
    """ValueError for a flag of a drawn world that is out of bounds."""
    limits = {"scenes": (1, 10**6), "val_scenes": (1, 10**6), "image_size": (32, 1024), "rows": (1, 20)}
    for flag, (least, most) in limits.items():
        if not least <= getattr(args, flag) <= most:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected {least} to {most}")


def main(argv=None):
    from common.cli import Parser, reason  # here, as a world without a command line needs none

    parser = Parser(__file__, "\n\n".join(__doc__.split("\n\n")[:2]))  # the rest is for those who read the code
    add = parser.start.add_argument
    add("--out_dir", type=Path, default=Path("out/scenes"), help="folder to write to, made if needed")
    add("--scenes", type=int, default=12000, help="pictures to train on")
    add("--val_scenes", type=int, default=400, help="pictures of val, and of val_new")
    add("--seed", type=int, default=0, help="another number, another world")
    forms = "chat, for a VLM; text, in which words take the place of pictures, for an LLM; captions, for an encoder"
    add("--form", choices=("chat", "text", "captions"), default="chat", help=forms)
    add = parser.group("the scenes").add_argument
    add("--image_size", type=int, default=64, metavar="PIXELS", help="side of a picture, 32 to 1024")
    few = "least and most objects in a scene, 1 to 4"
    add("--objects", type=int, nargs=2, default=(1, 4), metavar=("MIN", "MAX"), help=few)
    add("--rows", type=int, default=4, help="conversations about a picture")
    kinds = f"conversations to write, of {', '.join(KINDS)}"
    add("--kinds", nargs="+", choices=KINDS, default=list(USUAL), metavar="KIND", help=kinds)
    lists = f"what conversations of kind each ask of all objects, of {', '.join(EACH)}"
    add("--lists", nargs="+", choices=EACH, default=list(LOOK_UPS), metavar="LIST", help=lists)
    plain = "each question in its first wording alone, as for a model's first lessons"
    add("--plain", action="store_true", help=plain)
    args = parser.parse_args(argv)
    try:
        check_numbers(args)
        if not 1 <= args.objects[0] <= args.objects[1] <= 4:
            raise ValueError(f"--objects {args.objects[0]} {args.objects[1]}: expected two numbers from 1 to 4, rising")
        write_world(**vars(args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {reason(error)}") from None


if __name__ == "__main__":
    main()
