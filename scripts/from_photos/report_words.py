"""What the report of `scripts.from_photos` says other than that of the quickstart, in English and Chinese."""

from scripts.quickstart import report_words

OTHER = {
    "en": {
        "title": "A model from photos",
        "intro": "A vision-language model of {size:.1f} million parameters, trained from nothing on this computer in "
        "{time}, on {train:,} photos with {captions:,} captions. Scored on {val:,} photos that it has never seen.",
        "metrics": {"cider": "CIDEr", "bleu": "BLEU", "loss": "loss per answer token"},
        "score": "score",
        "tile": "CIDEr in {language}, shuffled {shuffled}",
        "look about": "CIDEr and BLEU compare a caption with those that people wrote: higher is better; of the loss "
        "(nats) lower is. With shuffled photos the same model describes somebody else's photo: what it then scores, it "
        "owes to knowing how captions sound.",
        "true": "true photos",
        "gallery": "Photos and captions",
        "gallery about": "Held-out photos drawn by chance, not for being described well. Below each caption is one "
        "that a person wrote.",
        "person": "a person:",
        "photo": "held-out photo {name}",
        "stages": {
            "llm": "Decoder: learn to talk",
            "pretrain_vlm": "Stage 1: connect the eyes",
            "sft_vlm": "Stage 2: learn to answer",
        },
        "footer": "Made by <code>scripts.from_photos</code>. This page is one file and loads nothing.",
    },
    "zh": {
        "title": "从照片开始训练的模型",
        "intro": "参数量 {size:.1f}M 的视觉语言模型，在这台电脑上用 {time} 从零训练而成，"
        "用了 {train:,} 张照片和 {captions:,} 条描述。评分所用的 {val:,} 张照片，它从未见过。",
        "metrics": {"cider": "CIDEr", "bleu": "BLEU", "loss": "每个答案 token 的损失"},
        "score": "评分",
        "tile": "{language} CIDEr，打乱后 {shuffled}",
        "look about": "CIDEr 和 BLEU 把模型的描述与人写的描述作比较，越高越好；损失（单位 nat）越低越好。"
        "“打乱”是指让模型描述另一张照片：这时的得分只说明它熟悉描述的写法，与看图无关。",
        "true": "真实照片",
        "gallery": "照片与描述",
        "gallery about": "从未参加训练的照片中随机抽取，不挑好坏。每条描述下面是一条人写的描述。",
        "person": "人写的：",
        "photo": "未参加训练的照片 {name}",
        "stages": {"llm": "解码器：学会说话", "pretrain_vlm": "阶段一：接上眼睛", "sft_vlm": "阶段二：学会回答"},
        "tries": {"ask about a photo": "就一张照片提问", "talk about photos in the browser": "在浏览器里谈照片"},
        "footer": "由 <code>scripts.from_photos</code> 生成。这个网页是单个文件，不加载任何外部内容。",
    },
}
WORDS = {language: report_words.WORDS[language] | words for language, words in OTHER.items()}
