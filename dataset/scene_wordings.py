"""Wordings of questions about the picture world: many for each question, some of them held out from training.

`dataset.scene_questions` determines question and answer; `Words` selects one of the wordings below and varies it as
people do when they type. It replaces nouns by synonyms ("circle", "round thing"; "图片", "照片"), writes color for
colour, adds "please tell me", drops the question mark, or uses lower case.

Wordings marked * are held out. They make up val_wording, which asks the questions of val in these words. The difference
between the two scores shows how much the model depends on the wordings of its training.
"""

import random
import re
from functools import cache

# Kind and forms of a question, then its wordings; the first one is the plain one. {x} {y}: objects, {ax} {xs}: with "a"
# and in the plural, {p}: a place, {d}: an axis, {s}: a side, {v}: a predicate, {pic}: the picture.
WORDINGS = """
describe full
  Describe this picture. | Describe {pic}. | Describe {pic} in detail. | Say what is where, and how big.
  Give a detailed description of {pic}. | Write a detailed description. | Tell me everything you see.
  What is where in {pic}? | Describe everything in {pic}. | Explain in detail what {pic} shows. | Describe it.
  Describe all objects with size and place. | Describe what you see in detail. | Please describe {pic}.
  Can you describe {pic}? | Could you describe {pic} for me? | I want a description of {pic}. | Description
  A full description, please. | What objects are there, and where? | Describe {pic} with all details.
  * Please describe this in detail. | * Provide a description of {pic}. | * Would you describe {pic} for me?
  * Give me all the details of {pic}. | * Can you give me a description of {pic}?
  描述这张图片。 | 描述{pic}。 | 详细描述{pic}。 | 说出什么在哪里，有多大。 | 请描述一下{pic}。
  描述一下{pic}的内容。 | 详细说说{pic}里有什么。 | 给我详细介绍{pic}。 | 把你看到的都说出来。
  什么东西在什么位置？ | 请详细描述。 | 能描述一下{pic}吗？ | 你能详细描述{pic}吗？ | 帮我描述{pic}。
  具体描述{pic}。 | 请描述{pic}。 | 描述 | 详细描述一下。
  * 请你把{pic}详细描述一遍。 | * 描述下{pic}。 | * 详细讲讲{pic}。 | * 能不能描述{pic}？
describe short
  What is in {pic}? | Describe {pic} briefly. | What do you see? | What can you see in {pic}? | What is this?
  What does {pic} show? | What is shown in {pic}? | What is in here? | Give a short description. | Name the objects.
  What objects are there? | What is depicted? | Summarize {pic}. | Write a short caption. | Caption this.
  What are we looking at? | Tell me what is in {pic}. | Which objects are in {pic}? | What things do you see?
  Describe {pic} in a few words. | What is it? | Briefly describe what you see. | What is there?
  * What do you see in {pic}? | * Briefly, what is in {pic}? | * Tell me what you see. | * What is on {pic}?
  * Give me a short description of {pic}.
  图片里有什么？ | 简单描述{pic}。 | 你看到了什么？ | {pic}里有什么？ | 有哪些图形？ | 这是什么？
  {pic}里都有什么东西？ | 有什么？ | 看到什么了？ | 用一句话描述{pic}。 | 说说{pic}里有什么。 | 简短描述一下。
  {pic}画了什么？ | 画的是什么？ | 里面有什么？ | 简单介绍一下{pic}。 | 你看见什么？ | {pic}中有什么？
  * {pic}上有什么？ | * 简单说说{pic}。 | * 你能看到什么？ | * {pic}里有哪些东西？
describe list
  List shape, colour, size and place. | List the objects, shapes first.
  List all objects: shape, colour, size, place. | List everything with shape, colour, size and place.
  Make a list of all objects. | A list of everything, please. | Give me a list: shape, colour, size, place.
  As a list: shape, colour, size and place.
  * List what you see: shape, colour, size, place. | * Make a list with shape, colour, size and place.
  列出形状、颜色、大小和位置。 | 列出图形，先说形状。 | 列出所有图形的形状、颜色、大小和位置。
  把所有图形列成清单。 | 按形状、颜色、大小、位置列出来。 | 列个清单：形状、颜色、大小、位置。
  列出全部图形，先说形状。
  * 列出每个图形的形状、颜色、大小、位置。 | * 请列一个清单，先说形状。
what at
  What is in the {p}? | Which object is in the {p}? | What is at the {p}? | What do you see in the {p}?
  What is there in the {p}? | What does the {p} show? | What can you find in the {p}? | Name the object in the {p}.
  In the {p}, what is there? | What object is in the {p} of {pic}? | The {p} holds what?
  Which object is at the {p}?
  * What can you see in the {p}? | * Tell me what is in the {p}. | * What is located in the {p}?
  {p}是什么？ | {p}是哪个图形？ | {p}有什么？ | {p}的图形是什么？ | {p}是什么东西？ | 你在{p}看到什么？
  {pic}的{p}是什么？ | 在{p}的是什么？ | {p}那个是什么？ | {p}画的是什么？ | {pic}{p}是哪个图形？
  * {pic}的{p}有什么？ | * {p}看到的是什么？ | * 说说{p}是什么。
what shape
  What shape is the {x}? | Which shape does the {x} have? | What kind of shape is the {x}? | What is the {x}?
  What is the shape of the {x}? | Tell me the shape of the {x}. | The {x} is what shape?
  Name the shape of the {x}. | What form does the {x} have? | What sort of shape is the {x}?
  * The {x}: what shape is it? | * What shape does the {x} have? | * Which shape is the {x}?
  {x}是什么形状？ | {x}是哪种形状？ | {x}的形状是什么？ | {x}是什么样的形状？ | {x}长什么形状？ | {x}是什么？
  说出{x}的形状。 | {x}属于哪种形状？ | {x}什么形状？
  * {x}是啥形状？ | * {x}是个什么形状？ | * 说说{x}的形状。
colour of
  What colour is the {x}? | Which colour does the {x} have? | What is the colour of the {x}?
  The {x} is what colour? | Tell me the colour of the {x}. | What colour does the {x} have?
  Which colour is the {x}? | The colour of the {x}? | Name the colour of the {x}. | How is the {x} coloured?
  What colour do you see on the {x}? | Colour of the {x}
  * In what colour is the {x}? | * The {x} has which colour? | * Do you know the colour of the {x}?
  {x}是什么颜色？ | {x}是哪种颜色？ | {x}是什么颜色的？ | {x}的颜色是什么？ | {x}什么颜色？ | {x}是什么色的？
  {x}有什么颜色？ | 说出{x}的颜色。 | {x}涂的是什么颜色？ | {x}的颜色是哪种？
  * {x}是啥颜色？ | * {x}的颜色？ | * 那个{x}是什么颜色的？
count all
  How many objects are there? | How many objects do you see? | Count the objects. | How many objects are in {pic}?
  What is the number of objects? | How many objects does {pic} have? | How many objects can you see?
  How many objects in all? | How many shapes are in {pic}? | How many are there? | Number of objects?
  Tell me how many objects there are. | How many shapes are there? | Count everything in {pic}.
  * How many objects does {pic} show? | * Count all the objects in {pic}. | * How many objects can you count?
  有几个图形？ | 你看到几个图形？ | 一共有几个图形？ | 有多少个图形？ | {pic}里有几个图形？ | 数一数有几个图形。
  图形的数量是多少？ | 总共多少个图形？ | {pic}里一共有多少图形？ | 数一下图形。
  * {pic}里总共有几个图形？ | * 共有多少个图形？ | * 你能数出几个图形？
count part
  How many {xs} are there? | How many {xs} do you see? | Count the {xs}. | How many {xs} are in {pic}?
  What is the number of {xs}? | How many {xs} does {pic} have? | How many {xs} can you see? | How many {xs}?
  Tell me how many {xs} there are. | Number of {xs}? | What is the count of {xs}?
  * How many {xs} does {pic} show? | * Count all the {xs} in {pic}. | * How many {xs} can you count?
  有几个{x}？ | 你看到几个{x}？ | 一共有几个{x}？ | 有多少个{x}？ | {pic}里有几个{x}？ | 数一数有几个{x}。
  {x}的数量是多少？ | 总共多少个{x}？ | {pic}里一共有多少{x}？ | {x}有几个？ | {x}有多少个？
  * {pic}里总共有几个{x}？ | * 共有多少个{x}？ | * 你能数出几个{x}？
where of
  Where is the {x}? | Where do you see the {x}? | In which place is the {x}? | What is the position of the {x}?
  Where can I find the {x}? | Where in {pic} is the {x}? | Tell me where the {x} is. | Locate the {x}.
  Find the {x}. | Which part of {pic} has the {x}? | In what place do you see the {x}?
  Where does {pic} show the {x}?
  * Where is the {x} located? | * In what part of {pic} is the {x}? | * What is the place of the {x}?
  {x}在哪里？ | 你在哪里看到{x}？ | {x}在哪儿？ | {x}在什么位置？ | {x}的位置在哪里？ | {x}位于哪里？
  {x}在{pic}的哪个位置？ | 说出{x}的位置。 | 找一下{x}在哪里。 | {x}在什么地方？
  * {x}在哪个地方？ | * {x}在{pic}的什么地方？ | * {x}在哪？
exists pair part
  Is there {ax}? | Do you see {ax}? | Is there {ax} in {pic}? | Do you see {ax} in {pic}? | Can you see {ax}?
  Does {pic} have {ax}? | Can you find {ax} in {pic}? | Does {pic} show {ax}? | Are there any {xs}? | Any {xs}?
  Do you see any {xs} in {pic}? | Is {ax} in {pic}? | Are there any {xs} in {pic}? | Is there {ax} here?
  * Can you spot {ax}? | * Does {pic} contain {ax}? | * Can you see any {xs}? | * Is there any {x} in {pic}?
  有{x}吗？ | 有没有{x}？ | 图片里有{x}吗？ | 图片里有没有{x}？ | 能看到{x}吗？ | 你看得到{x}吗？ | 里面有{x}吗？
  存在{x}吗？ | 你看见{x}了吗？ | 是否有{x}？ | {pic}里是否有{x}？ | {pic}里能看到{x}吗？
  * 看得见{x}吗？ | * 这里有没有{x}？ | * 能找到{x}吗？
relation which
  Is the {x} {d} the {y}? | Do you see the {x} {d} the {y}? | Is the {x} {s} the {y}?
  Where is the {x}, {d} the {y}? | Would you say the {x} is {d} the {y}? | The {x}: {d} the {y}?
  Tell me if the {x} is {d} the {y}. | Can you tell whether the {x} is {d} the {y}?
  Do you see the {x} {s} the {y}? | The {x} is {s} the {y}, right?
  * Does the {x} stand {d} the {y}? | * Say if the {x} is {d} the {y}. | * Can you see the {x} {s} the {y}?
  {x}在{y}的{d}？ | 你看到{x}在{y}的{d}？ | {x}是在{y}的{d}？ | {x}位于{y}的{d}？ | {x}在{y}的{s}吗？
  相对{y}，{x}在{d}？ | {x}是不是在{y}的{s}？ | 你看{x}在{y}的{d}？
  * 你觉得{x}在{y}的{d}？ | * {x}到底在{y}的{d}？ | * {x}是在{y}的{s}吗？
size of
  Is the {x} big or small? | What size is the {x}? | How big is the {x}? | What is the size of the {x}?
  Which size does the {x} have? | Is the {x} small or big? | Tell me the size of the {x}. | How large is the {x}?
  The {x} is big or small? | Is the {x} a big one or a small one? | Size of the {x}?
  * Would you call the {x} big or small? | * The size of the {x}? | * What size does the {x} have?
  {x}是大还是小？ | {x}有多大？ | {x}的大小是什么？ | {x}是大的还是小的？ | {x}多大？ | {x}是小还是大？
  说出{x}的大小。 | {x}大小如何？
  * {x}算大还是小？ | * {x}的大小？ | * {x}到底有多大？
size which
  Which is bigger, the {x} or the {y}? | What is bigger: the {x} or the {y}? | Is the {x} or the {y} bigger?
  Which one is bigger, the {x} or the {y}? | Which is larger, the {x} or the {y}? | Is the {x} bigger than the {y}?
  Of the {x} and the {y}, which is bigger? | Tell me which is bigger, the {x} or the {y}.
  Compare the sizes of the {x} and the {y}. | Which of the two is bigger, the {x} or the {y}?
  * What is larger, the {x} or the {y}? | * Between the {x} and the {y}, which is bigger?
  * The {x} or the {y}: which one is bigger?
  {x}和{y}，哪个更大？ | 哪个更大，{x}还是{y}？ | {x}和{y}哪个大？ | {x}跟{y}比，哪个大？ | 比较{x}和{y}的大小。
  {x}与{y}谁更大？ | 更大的是{x}还是{y}？ | {x}比{y}大吗？
  * {x}大还是{y}大？ | * {x}和{y}之中哪个更大？ | * 谁更大，{x}还是{y}？
check colour shape size place
  Is the {x} {v}? | The {x} is {v}, right? | Would you say the {x} is {v}? | Is it true that the {x} is {v}?
  Can you confirm that the {x} is {v}? | Is the {x} really {v}? | Check whether the {x} is {v}. | So the {x} is {v}?
  Is it right that the {x} is {v}? | Do you think the {x} is {v}? | Is the {x} {v} or not?
  * The {x}: is it {v}? | * Is it correct that the {x} is {v}? | * Am I right that the {x} is {v}?
  {x}{v}吗？ | {x}{v}，对吗？ | {x}{v}，对不对？ | {x}真的{v}吗？ | 你觉得{x}{v}吗？ | {x}{v}，是不是？
  {x}{v}，是吗？ | 是不是{x}{v}？ | {x}到底{v}吗？
  * {x}{v}，没错吧？ | * 我说{x}{v}，对吗？ | * 你看{x}{v}吗？
compare more
  Which picture has more objects, the first or the second?
  Which has more objects, the first or the second picture? | Which picture has more objects?
  Which one has more objects? | In which picture are there more objects?
  Where are more objects, in the first or the second picture? | Which of the two has more objects?
  Does the first or the second picture have more objects? | Compare the numbers of objects.
  * Which of the two pictures has more objects? | * Are there more objects in the first or the second picture?
  哪张图片的图形更多，第一张还是第二张？ | 第一张和第二张，哪张的图形更多？ | 哪张图片的图形更多？
  哪张图片的图形多？ | 两张图片，哪张的图形更多？ | 第一张还是第二张的图形更多？ | 哪张的图形多一些？
  * 哪一张的图形更多？ | * 两张图片里哪张图形多？
compare has
  Which picture shows {ax}, the first or the second? | Is there {ax} in the first or the second picture?
  Which picture has {ax}? | In which picture is {ax}? | Which of the two pictures has {ax}? | Which one shows {ax}?
  Where is {ax}, in the first or the second picture? | Does the first or the second picture have {ax}?
  Find the picture with {ax}. | Which picture shows {ax}?
  * In which of the two pictures do you see {ax}? | * Which picture contains {ax}?
  哪张图片有{x}，第一张还是第二张？ | 第一张和第二张，哪张有{x}？ | 哪张图片有{x}？ | {x}在哪张图片里？
  {x}在第一张还是第二张？ | 哪张图片里能看到{x}？ | 两张图片，哪张有{x}？ | 哪张有{x}？
  * 哪一张里有{x}？ | * {x}出现在哪张图片里？
compare both
  Compare these pictures. | Compare the two pictures. | Describe these pictures. | Describe both pictures.
  What is in the two pictures? | What do the pictures show? | What is the difference between the two pictures?
  Tell me what is in each picture. | What is in each picture? | What do you see in the two pictures?
  * Compare both pictures. | * What does each picture show?
  比较这两张图片。 | 描述这两张图片。 | 两张图片里有什么？ | 这两张图片有什么不同？ | 分别描述两张图片。
  两张图片分别有什么？ | 这些图片里有什么？ | 比较两张图片。
  * 对比这两张图片。 | * 两张图片各有什么？
greet hello
  Hello | Hi | Hey | Hello! | Hi there | Hello there! | Good morning | How are you? | Who are you? | What are you?
  What can you do? | What can I ask you? | Help | How does this work? | Are you there? | Hey there! | Good day
  * Good evening | * Who am I talking to? | * What can you do for me? | * Nice to meet you
  你好 | 您好 | 你好！ | 嗨 | 你是谁？ | 你能做什么？ | 你会什么？ | 我可以问什么？ | 在吗？ | 早上好 | 你好呀
  怎么用？ | 你是什么模型？ | 介绍一下你自己。 | 你好啊
  * 你叫什么名字？ | * 晚上好 | * 你能干什么？
each colour
  What colours are {them}?
  {them}各是什么颜色？
each shape
  What shapes are {them}?
  {them}各是什么形状？
each place
  Where are {them}?
  {them}各在哪里？
each size
  What sizes are {them}?
  {them}各有多大？
each object
  What is in {them}?
  {them}各是什么？
each exists
  Do you see {them}?
  有没有{them}？
each count
  How many {them} are there?
  {them}各有几个？
each check
  Is {them}?
  {them}，对不对？
"""

ALIASES = {  # words of the world → synonyms in questions; answers use only the former
    "en": """
circle: disc, dot, round thing, round shape    square: box, square shape    triangle: triangular shape
star: star shape    heart: heart shape    cross: plus sign, plus    ring: hoop, donut    moon: crescent, half moon
object: thing, item, figure    purple: violet    big: large    small: little, tiny
picture: image, photo, pic, drawing
top left: upper left, top left corner    top middle: top centre, upper middle    top right: upper right, top-right
middle left: left middle, centre left    middle: centre, center    middle right: right middle, centre right
bottom left: lower left, bottom-left    bottom middle: lower middle, bottom centre    bottom right: lower right
""",
    "zh": """
圆形: 圆, 圆圈, 圆点    方块: 正方形, 方形    三角: 三角形    星星: 五角星, 星形    爱心: 心形    十字: 十字形, 加号
圆环: 环, 环形    月亮: 月牙, 弯月    图形: 东西, 物体    图片: 图, 照片, 图像, 画
左上角: 左上, 左上方    上方: 正上方, 上边    右上角: 右上, 右上方    左侧: 左边中间    正中: 中间, 正中间, 中央
右侧: 右边中间    左下角: 左下, 左下方    下方: 正下方, 下边    右下角: 右下, 右下方
""",
}
PICTURE = {"en": ("the picture", "this picture"), "zh": ("图片", "这张图片", "这幅图片")}
BEFORE = {
    "en": (
        "Please tell me: ",
        "Can you tell me: ",
        "Tell me, ",
        "Hey, ",
        "Hi! ",
        "So, ",
        "Quick question: ",
        "Please: ",
    ),
    "zh": ("请问，", "请问", "告诉我，", "请告诉我，", "帮我看看，", "麻烦看一下，", "你好，", "想问一下，"),
}
AFTER = {"en": (", please", ", thanks", " please"), "zh": ("谢谢", "，谢谢", "呢")}
MARKS = "?.!？。！"
BETWEEN = ("\n", "\n", "\n\n", " ", "  ", "")  # between picture and text

CHINESE = re.compile("[\u4e00-\u9fff]")


@cache
def wordings() -> dict[str, dict[str, dict[str, tuple[list[str], list[str]]]]]:
    """{kind: {form: {lang: (wordings to train on, wordings held out)}}}"""
    table = {}
    for line in WORDINGS.strip().splitlines():
        if not line.startswith(" "):
            kind, *forms = line.split()
            of_block = {"en": ([], []), "zh": ([], [])}
            table.setdefault(kind, {}).update(dict.fromkeys(forms, of_block))
            continue
        for wording in (part.strip() for part in line.split("|")):
            lang = "zh" if CHINESE.search(wording) else "en"
            of_block[lang][wording.startswith("*")].append(wording.lstrip("* "))
    return table


@cache
def aliases(lang: str) -> tuple[dict[str, list[str]], re.Pattern]:
    """{word: its synonyms}, and a pattern that finds these words in a question, longest first."""
    entries = [entry.split(": ") for entry in re.split(r"\n| {4}", ALIASES[lang].strip())]
    others_of = {word: others.split(", ") for word, others in entries}
    words = "|".join(sorted(others_of, key=len, reverse=True))
    return others_of, re.compile(rf"\b({words})((?:e?s)?)\b" if lang == "en" else f"({words})")


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


class Words:
    """Turns a question into one of its wordings.

    style: "plain": the first wording, unchanged; "train": any wording for training, varied as people type; "held out":
    the other wordings. rng: not shared, so that every style asks the same questions.
    """

    def __init__(self, style: str, rng: random.Random):
        self.style, self.rng = style, rng

    def ask(self, kind: str, form: str, lang: str, slots: dict[str, str]) -> str:
        of_lang, rng = wordings()[kind][form][lang], self.rng
        if self.style == "plain" or not of_lang[1]:
            return of_lang[0][0].format(**slots, pic=PICTURE[lang][0])
        # The most common question, in its most common form.
        if self.style == "train" and (kind, form) == ("describe", "full") and rng.random() < 0.4:
            return of_lang[0][0]
        text = rng.choice(of_lang[self.style == "held out"]).format(**slots, pic=rng.choice(PICTURE[lang]))
        return self.typed(text, lang) if kind != "greet" else self.careless(text)

    def between(self) -> str:
        """The separator between a picture and the text."""
        return "\n" if self.style == "plain" else self.rng.choice(BETWEEN)

    def typed(self, text: str, lang: str) -> str:
        """Varies a question: synonyms, spelling, polite words, punctuation."""
        rng, (others, find) = self.rng, aliases(lang)

        def other(match):
            if rng.random() < 0.6:
                return match[0]
            word = rng.choice(others[match[1]])
            return plural(word) if match.lastindex == 2 and match[2] else word

        text = find.sub(other, text)
        if lang == "en":
            if rng.random() < 0.5:
                text = text.replace("colour", "color")
            if rng.random() < 0.2:
                text = re.sub(r"^(What|Where) is\b", r"\1's", text)
        elif rng.random() < 0.3:  # 红圆形 → 红色的圆形
            text = re.sub("([红橙黄绿蓝紫黑白])(?!色)", rng.choice((r"\1色", r"\1色的")), text)
        if rng.random() < 0.2:
            before = rng.choice(BEFORE[lang])
            text = before + (text if before.endswith("! ") else text[0].lower() + text[1:])
        if rng.random() < 0.1:
            bare = text.rstrip(MARKS)
            text = bare + rng.choice(AFTER[lang]) + text[len(bare) :]
        return self.careless(text)

    def careless(self, text: str) -> str:
        """Sometimes drops the mark at the end, sometimes uses lower case."""
        rng = self.rng
        if rng.random() < 0.3:
            text = text.rstrip(MARKS)
        elif rng.random() < 0.2:
            text = text.replace("？", "?").replace("，", ",").replace("。", ".")
        return text.lower() if rng.random() < 0.4 else text
