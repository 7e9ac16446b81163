"""The built-in picture world: small scenes of coloured shapes, and conversations about them in English and Chinese.

    python -m dataset.scenes --out_dir out/scenes --scenes 12000 --seed 0

Data to train a model from scratch, without any download. It writes {train,val,val_wording,val_new}.jsonl and images/
into out_dir, in the same format as any other data set of this repository:

    {"conversations": [{"role": "user", "content": "<image>\\nWhat colour is the star?"},
                       {"role": "assistant", "content": "the star is purple"}],
     "image": "val_new_00007.jpg", "kind": "colour", "lang": "en"}

* Scores are split by `kind` (in a conversation: of each question) and `lang`; training ignores both.
* Each question has one right answer in one form, so exact match is a fair score. Ambiguous questions (which of two red
  circles? left of, or rather below?) are not asked.
* Of all possible questions about a scene, the one with the rarest answer so far (`used`) is asked. A model that ignores
  the picture therefore scores only about a fifth (measured by tests/test_scenes.py).
* val contains other scenes of the same kind as train. val_wording asks the same questions about them, in wordings that
  do not occur in train (`dataset.scene_wordings`). Each scene of val_new contains a combination that occurs in no
  picture and no text of train: a pair of colour and shape (NEW_PAIRS), or three of a shape in a corner (`is_new`). All
  questions of val_new are about these. Every single colour and shape occurs in train.

--form captions writes a caption of every object, for contrastive training; one in five objects of train has a shade
without a name. --form text writes conversations with a description instead of the picture, for training on text. The
same seed gives the same scenes in every form. `dataset.scene_pictures` draws scenes, `dataset.scene_questions`
contains questions and answers.
"""

if __spec__ is None:  # started by its path, where Python cannot import the other folders
    raise SystemExit("type -m dataset.scenes instead of dataset/scenes.py")

if __name__ == "__main__":
    from common.start import begin

    begin()  # from here on, Ctrl-C or a missing package gives one message

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

KINDS = {  # share of rows, if scenes allow it; "multi" is a conversation of several questions, "each" of several lists
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
USUAL = tuple(kind for kind in KINDS if kind != "each")  # "each" is practice: looking up all objects, one by one
# Kinds of questions in a conversation. Not a description, which would give away the other answers.
TURNS = ("what", "colour", "count", "where", "exists", "relation", "size", "check")
LENGTH = (4, 12)  # number of questions drawn for a conversation; impossible and repeated ones are dropped

# ---------------------------------------------------------------------------- rows


def rows_of(
    scene, image: str, rng, used: Counter, rows=4, kinds=USUAL, new=False, other=None, lists=LOOK_UPS, style="train"
) -> list[dict]:
    """Conversations about a scene, half of them Chinese, in the format of the module's docstring; at most `rows`.

    Args:
        image: the file name of its picture.
        rng: random.Random.
        used: see `ask`; shared by a whole split.
        kinds: the keys of KINDS to choose from.
        new: for val_new, ask only about new combinations, see `is_new`.
        other: (scene, name of its picture) to compare with; None for no "compare".
        lists: the keys of EACH to choose from.
        style: of the wordings, see `Words`; every style asks the same questions.
    """
    kinds = [kind for kind in kinds if kind != "compare" or other]
    kinds = [kind for kind in kinds if not (new and kind in ANSWERS)]  # they are about no object
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
        switch = len(turns)  # from this turn on, questions are about the other picture
        if kind == "multi" and other and rng.random() < 0.2:
            switch = len(turns) // 2
        asked = {}  # meaning of a question → kind, question, answer, pictures
        for i, (turn, form) in enumerate(turns):
            shown = pictures if i < switch else [other]
            scenes = [one for one, _ in shown] or [scene]
            if asking := ask(scenes, turn, lang, rng, used, new, words, form):
                meaning, question, answer = asking
                asked.setdefault((*meaning, i < switch, answer), (turn, question, answer, shown))
        if len(asked) < (2 if kind == "multi" else 1) or not meanings.isdisjoint(asked):
            continue
        meanings.update(asked)
        # Lists show the picture first, which is easier to learn; they still draw a number, so later rows stay the same.
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
    """Describes a scene in the order of its patches: "picture: topleftbigredstar middlesmallbluering".

    One word per object contains its place and all attributes, just as one patch of a picture is one vector.
    """
    words = [f"{thing.place.replace(' ', '')}{thing.size}{thing.colour}{thing.shape}" for thing in scene.things]
    return " ".join(["picture:", *words])


def captions_of(scene: Scene, image: str) -> list[dict]:
    """Rows that say, for each thing and in each language, what and where it is: "a big red star in the middle".

    Also without size and colour, "a star in the middle": an encoder must recognise a shape in a colour that it has
    never seen it in.
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
    """As `rows_of`, with a description instead of each picture and without "image". other: a scene to compare with."""
    scenes = {"one": scene, "two": other}
    chats = rows_of(scene, "one", rng, used, rows, kinds, new, other and (other, "two"), lists, style)
    for row in chats:
        descriptions = [describe_in_words(scenes[picture]) for picture in row.pop("image", "").split(", ") if picture]
        for turn in row["conversations"][::2]:
            # The words for objects must not merge with the text next to them.
            content = re.sub(r"(?<=\S)(?=<image>)|(?<=<image>)(?=\S)", "\n", turn["content"])
            while "<image>" in content:
                content = content.replace("<image>", descriptions.pop(0), 1)
            turn["content"] = content
    return chats


def scenes_of(split: str, count: int, seed: int, objects=(1, 4)) -> Iterator[Scene]:
    """The scenes of "train", "val" or "val_new". Each has its own seed, so a larger count keeps the first scenes."""
    for i in range(count):
        yield random_scene(random.Random(f"{seed} {split} {i}"), split == "val_new", objects)


def refuse_to_overwrite(out_dir: Path, splits) -> None:
    """Raises ValueError if the rows of one of these splits exist already."""
    for split in splits:
        if (out_dir / f"{split}.jsonl").exists():
            raise ValueError(f"--out_dir {out_dir}: {split}.jsonl exists already. Choose another folder, or remove it")


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

    The same arguments give the same bytes. Other rows or kinds show the same scenes. The .jsonl files appear only when
    they are complete. Raises ValueError if one exists already.
    form: "chat": conversations; "text": with descriptions and without images/; "captions": see `captions_of`.
    plain: use only the first wording of each question. With plain or captions there is no val_wording.
    """
    out_dir = Path(out_dir)
    splits = {"train": scenes, "val": val_scenes, "val_wording": val_scenes, "val_new": val_scenes}
    if plain or form == "captions":
        del splits["val_wording"]
    refuse_to_overwrite(out_dir, splits)
    (out_dir if form == "text" else out_dir / "images").mkdir(parents=True, exist_ok=True)
    written = {}
    for split, count in splits.items():
        of_scenes = "val" if split == "val_wording" else split  # the same pictures and questions, other wordings
        style = "plain" if plain else "held out" if split == "val_wording" else "train"
        start, used, other, written[split] = time.perf_counter(), Counter(), None, 0
        temporary = out_dir / f"{split}.jsonl.tmp"
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
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
    """Raises ValueError for a flag of a drawn world that is out of range."""
    limits = {"scenes": (1, 10**6), "val_scenes": (1, 10**6), "image_size": (32, 1024), "rows": (1, 20)}
    for flag, (least, most) in limits.items():
        if not least <= getattr(args, flag) <= most:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected {least} to {most}")


def main(argv=None):
    from common.cli import Parser, reason  # here, because write_world() does not need it

    parser = Parser(__file__, "\n\n".join(__doc__.split("\n\n")[:2]))  # the rest is for readers of the code
    add = parser.start.add_argument
    add("--out_dir", type=Path, default=Path("out/scenes"), help="output folder, created if needed")
    add("--scenes", type=int, default=12000, help="number of pictures for training")
    add("--val_scenes", type=int, default=400, help="number of pictures in val, and in val_new")
    add("--seed", type=int, default=0, help="another number gives another world")
    forms = "chat: for a VLM; text: with descriptions instead of pictures, for an LLM; captions: for an encoder"
    add("--form", choices=("chat", "text", "captions"), default="chat", help=forms)
    add = parser.group("the scenes").add_argument
    add("--image_size", type=int, default=64, metavar="PIXELS", help="width and height of a picture, 32 to 1024")
    few = "minimum and maximum number of objects in a scene, 1 to 4"
    add("--objects", type=int, nargs=2, default=(1, 4), metavar=("MIN", "MAX"), help=few)
    add("--rows", type=int, default=4, help="conversations per picture")
    kinds = f"kinds of conversations to write: {', '.join(KINDS)}"
    add("--kinds", nargs="+", choices=KINDS, default=list(USUAL), metavar="KIND", help=kinds)
    lists = f"what conversations of kind each ask about all objects: {', '.join(EACH)}"
    add("--lists", nargs="+", choices=EACH, default=list(LOOK_UPS), metavar="LIST", help=lists)
    plain = "use only the first wording of each question, to start simple"
    add("--plain", action="store_true", help=plain)
    args = parser.parse_args(argv)
    try:
        check_numbers(args)
        if not 1 <= args.objects[0] <= args.objects[1] <= 4:
            raise ValueError(
                f"--objects {args.objects[0]} {args.objects[1]}: expected two numbers from 1 to 4 in ascending order"
            )
        write_world(**vars(args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {reason(error)}") from None


if __name__ == "__main__":
    main()
