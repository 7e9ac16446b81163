"""The texts in which the report of `scripts.from_photos` differs from the quickstart's, in English and Chinese."""

from scripts.quickstart import report_words

OTHER = {
    "en": {
        "title": "A model trained on photos",
        "intro": "A vision-language model of {size:.1f} million parameters, trained from scratch on this computer in "
        "{time}, on {train:,} photos with {captions:,} captions. Its scores are from {val:,} other photos.",
        "metrics": {"cider": "CIDEr", "bleu": "BLEU", "loss": "loss per answer token"},
        "score": "score",
        "tile": "CIDEr in {language}, shuffled {shuffled}",
        "look about": "CIDEr and BLEU compare a caption with captions by people: higher is better. For the loss (nats) "
        "lower is better. With shuffled photos the model describes the photo of another row: this score only shows how "
        "well it knows typical captions.",
        "true": "true photos",
        "gallery": "Photos and captions",
        "gallery about": "Held-out photos picked at random, described well or not. Below each caption is one by a "
        "person.",
        "person": "a person:",
        "photo": "held-out photo {name}",
        "stages": {
            "llm": "Decoder: learn to talk",
            "pretrain_vlm": "Stage 1: connect the eyes",
            "sft_vlm": "Stage 2: learn to answer",
            "scst_vlm": "Stage 3: learn from scores",
        },
        "loss": "Loss per answer token, in nats; in stage 3 the reward, the mean CIDEr of sampled captions:",
        "curve": "{title}: loss or reward by step, at the end {last}",
        "footer": "Created by <code>scripts.from_photos</code>. This page is one file and loads nothing else.",
    },
    "zh": {
        "title": "用照片训练的模型",
        "intro": "这是一个参数量 {size:.1f}M 的视觉语言模型，在这台电脑上用 {train:,} 张照片和 {captions:,} 条描述"
        "从零训练，用时 {time}。评分用的 {val:,} 张照片没有参加训练。",
        "metrics": {"cider": "CIDEr", "bleu": "BLEU", "loss": "每个答案 token 的损失"},
        "score": "评分",
        "tile": "{language} CIDEr，打乱后 {shuffled}",
        "look about": "CIDEr 和 BLEU 衡量模型的描述与人写的描述有多接近，越高越好；损失（单位 nat）越低越好。"
        "“打乱”是指让模型描述另一张照片：这时的得分只反映它对描述写法的熟悉程度，与看图无关。",
        "true": "真实照片",
        "gallery": "照片与描述",
        "gallery about": "从没有参加训练的照片中随机抽取，不挑好坏。每条描述下面附一条人写的描述。",
        "person": "人写的：",
        "photo": "未参加训练的照片 {name}",
        "stages": {
            "llm": "解码器：学习语言",
            "pretrain_vlm": "阶段一：接入视觉",
            "sft_vlm": "阶段二：学习回答",
            "scst_vlm": "阶段三：从得分中学习",
        },
        "loss": "每个答案 token 的损失（nat）；阶段三是奖励，即采样所得描述的平均 CIDEr：",
        "curve": "{title}：损失或奖励随步数的变化，最后{last}",
        "tries": {"ask about a photo": "就一张照片提问", "talk about photos in the browser": "在浏览器里就照片对话"},
        "footer": "由 <code>scripts.from_photos</code> 生成。这个网页是单个文件，不加载任何外部内容。",
    },
}
WORDS = {language: report_words.WORDS[language] | words for language, words in OTHER.items()}
