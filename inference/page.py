"""The web page: what it says in English and Chinese, what stands on it, and what happens when something is asked.

Nothing is kept between visitors but the loaded models: a conversation lives with its browser tab, its pictures in a
folder that goes with the process.
"""

import argparse
import html
import os
import threading
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import gradio as gr
import torch
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from inference.chat import Stop, UserError, chat_of, load_for_page, open_picture, paths_of, stream, truncate, turns_of
from inference.models import find_models, list_models, needs_picture, pictures_first, prompts_of

MOST_LOADED = 2  # models in memory
SAMPLES = sorted(Path("dataset/eval_images").glob("*.png"))
VISITORS = 500  # whose conversations Gradio remembers, 50 KB each; of its own accord 10,000

TEXT = {
    "en": {
        "hello": "**Show me a picture and ask about it.**\n\nUpload, paste or drop one, or pick from those below.",
        "type": "Ask about a picture",
        "samples": "Sample pictures",
        "questions": "Questions that the model knows",
        "settings": "Settings",
        "weights": "Model",
        "temperature": "Temperature",
        "temperature_info": "0: always the likeliest word; higher: more surprising",
        "top_p": "Top-p",
        "top_p_info": "Draw from the likeliest words that make up this share",
        "length": "Longest answer, in tokens",
        "seen": "Pictures seen: {n}",
        "unseen": "No picture was given, and this model was never trained without one",
        "earlier": " ({n} of earlier turns)",
        "took": "{tokens} tokens in {seconds:.2f} s",
        "late": "stopped after {seconds:g} s, the limit",
        "forgotten": "too long to remember whole: the first {n} turns were left out",
        "empty": "Type a question, or add a picture.",
        "long": "The text has {n} characters, at most {limit} are read. Please shorten it.",
        "many": "These are {n} pictures, at most {limit} can go with one question.",
        "pixels": "{name} has more than {limit:g} million pixels. Please make it smaller.",
        "broken": "{name} is not a picture that can be read. JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF can.",
        "tags": "The text says {tag} {n} times for {pictures} pictures. Write it once for each, or leave it out.",
        "room": "The question is more than the {limit} tokens that the model reads. Use less text or fewer pictures.",
        "run": "The text has so many {sign} in a row that the model would take them for a picture.",
        "memory": "The machine ran out of memory. Try again with fewer pictures, or clear the conversation.",
        "failed": "Something went wrong here, sorry. The log of the server says what.",
    },
    "zh": {
        "hello": "**给我看一张图片，然后提问。**\n\n可以上传、粘贴或拖入图片，也可以从下面选一张。",
        "type": "就图片提问",
        "samples": "示例图片",
        "questions": "模型熟悉的问题",
        "settings": "设置",
        "weights": "模型",
        "temperature": "温度",
        "temperature_info": "0：总是选最可能的词；越高越多变",
        "top_p": "Top-p",
        "top_p_info": "只从累计概率达到此值的最可能的词中抽取",
        "length": "回答的最大长度（token）",
        "seen": "看到的图片：{n}",
        "unseen": "没有给图片，而这个模型只在有图片的数据上训练过",
        "earlier": "（前面轮次的 {n} 张）",
        "took": "{tokens} 个 token，{seconds:.2f} 秒",
        "late": "达到 {seconds:g} 秒上限，已停止",
        "forgotten": "对话太长，最早的 {n} 轮没有读入",
        "empty": "请输入问题，或添加一张图片。",
        "long": "文字有 {n} 个字符，最多 {limit} 个。请缩短。",
        "many": "共有 {n} 张图片，每个问题最多 {limit} 张。",
        "pixels": "{name} 超过 {limit:g} 百万像素。请缩小后再试。",
        "broken": "{name} 不是可以读取的图片。支持 JPEG、PNG、WebP、GIF、BMP、TIFF 和 AVIF。",
        "tags": "文字中有 {n} 个 {tag}，但有 {pictures} 张图片。请每张写一次，或都不写。",
        "room": "问题超出模型能读的 {limit} 个 token。请减少文字或图片。",
        "run": "文字中连续的 {sign} 太多，模型会把它们当作图片。",
        "memory": "内存不足。请减少图片，或清空对话后再试。",
        "failed": "抱歉，这里出错了。原因见服务器日志。",
    },
}

CSS = """
.app { max-width: 60rem !important; padding: 0.5rem !important }
.app h1 { margin: 0.3rem !important; font-size: 1.3rem !important }
.placeholder { padding: 0 1.5rem; text-align: center }
.thought-group { border: none !important; padding: 0 !important; background: none !important }
.message-row .message.component { display: inline-block; width: auto; margin: 0.3rem 0.3rem 0.3rem 0 }
.message-row .message.component * { margin: 0; padding: 0; min-width: 0 }
.message-row .icon-button-wrapper.top-panel { display: none }
.user-row img { max-width: 7rem; max-height: 7rem; border-radius: 0.4rem }
.bot-row .message.component, .bot-row img { width: 2.6rem; border-radius: 0.3rem; image-rendering: pixelated }
.message-buttons-right, .message-buttons:has(~ .message-row) { display: none } /* they would share pictures */
.message-buttons .icon-button:nth-last-of-type(n + 3) { display: none } /* retry and undo stay */
#samples { margin: 0 !important }
#samples .gallery { flex-wrap: nowrap; overflow-x: auto }
#samples .gallery-item { flex: 0 0 3.2rem; width: 3.2rem }
#samples .gallery-item * { max-width: 100%; max-height: 3.2rem }
#questions { margin: 0 !important }
@media (max-width: 480px) { #questions .gallery { flex-wrap: nowrap; overflow-x: auto } }
@media (max-width: 480px) { #questions .gallery-item { flex: none } }
"""


def show_as_text(chatbot: gr.Chatbot) -> None:
    """Has text shown as it is, where Gradio would format the HTML in it, if sanitized.

    Only text and files come back from the browser: for a forged message with a component in it, Gradio would copy any
    file of this machine to where it is served from.
    """
    show, read = chatbot.postprocess, chatbot.preprocess

    def postprocess(value):
        shown = show(value)
        for message in shown.root:
            for content in message.content:
                if content.type == "text":
                    content.text = html.escape(content.text, quote=False)
        return shown

    def preprocess(payload):
        for message in payload.root if payload else ():
            message.content = [content for content in message.content if content.type in ("text", "file")]
        messages = read(payload)
        for message in messages:
            for content in message["content"]:
                if content["type"] == "text":
                    content["text"] = html.unescape(content["text"])
        return messages

    chatbot.postprocess, chatbot.preprocess = postprocess, preprocess


def reply(content, mark: str, **metadata) -> dict:
    """What is no answer of the model: "seen", about one, or a "notice" instead of one."""
    return {"role": "assistant", "content": content, "metadata": {"id": mark, **metadata}}


def language_of(request: gr.Request) -> str:
    return "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"


def build_page(args, models: list[Path]) -> gr.Blocks:
    # Gradio lets in one question at a time from the page, and one through the API. The lock makes that one in all: one
    # at work on the models, which loads them and reads its pictures.
    lock, loaded = threading.Lock(), {}  # {path: (model, tokenizer)}, the one used last at the end

    def get_model(path):
        pair = loaded.pop(path, None)
        if not pair:
            while len(loaded) >= MOST_LOADED:  # let go before the next one takes as much
                del loaded[next(iter(loaded))]
            pair = load_for_page(Path(path), args)
        loaded[path] = pair
        return pair

    get_model(str(models[0]))  # a mistake is told before the page is there

    def respond(message, history, weights, temperature, top_p, max_new_tokens, language, phrase):
        turns = [*turns_of(history), (message["text"].strip(), paths_of(message["files"]), "")]
        if not turns[-1][0] and not turns[-1][1]:
            raise UserError("empty")
        path = Path(weights)
        turns = [(text or prompts_of(path, language, len(files) > 1)[0], files, said) for text, files, said in turns]
        model, tokenizer = get_model(weights)
        first = pictures_first(path)
        kept = truncate(turns, tokenizer, model.config.image_ids, args, first)
        stop = Stop(args.max_seconds)
        paths = [file for _, files, _ in kept for file in files]
        pictures = [model.processor.resize(open_picture(file, model.processor, args.max_pixels)) for file in paths]
        shown = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
        shown = [{"path": save_pil_to_cache(picture, get_upload_folder(), format="png")} for picture in shown]
        earlier = len(paths) - len(kept[-1][1])
        title = phrase("seen", n=len(paths)) + (phrase("earlier", n=earlier) if earlier else "")
        if not paths and needs_picture(path):
            title = phrase("unseen")
        lines = [weights, *([phrase("forgotten", n=len(turns) - len(kept))] if len(kept) < len(turns) else [])]
        flags = {"temperature": float(temperature), "greedy": not temperature, "top_p": float(top_p)}
        flags = argparse.Namespace(**vars(args) | flags | {"max_new_tokens": int(max_new_tokens)})
        note = reply("\n".join(lines), "seen", title=title, status="done")
        seen = [note, *([reply(shown, "seen")] if shown else [])]
        text = ""
        for text in stream(model, tokenizer, chat_of(kept, first), pictures, flags, stop):
            yield [*seen, text]
        note["metadata"]["title"] += " · " + phrase("took", tokens=stop.tokens, seconds=stop.took())
        if stop.late:
            note["metadata"]["title"] += " · " + phrase("late", seconds=args.max_seconds)
        yield [*seen, text or reply("…", "seen")]

    def on_message(message, history, weights, temperature, top_p, max_new_tokens, request: gr.Request):
        """Ask about pictures: text and files, the model's path, temperature (0: greedy), top-p, longest answer."""
        language = language_of(request)

        def phrase(key, **values):
            return TEXT[language][key].format(**values)

        try:
            with lock:
                yield from respond(message, history, weights, temperature, top_p, max_new_tokens, language, phrase)
        except UserError as error:
            yield reply("⚠️ " + phrase(error.key, **error.values), "notice")
        except Exception as error:
            traceback.print_exc()
            memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
            if memory and torch.cuda.is_available():
                torch.cuda.empty_cache()
            yield reply("⚠️ " + phrase("memory" if memory else "failed"), "notice")

    tr, slider = gr.I18n(**TEXT), partial(gr.Slider, step=0.05, render=False)
    chatbot = gr.Chatbot(
        show_label=False,
        render_markdown=False,
        latex_delimiters=[],
        buttons=[],
        allow_file_downloads=False,
        placeholder=tr("hello"),
        height="max(20rem, calc(100dvh - 20.5rem))",
    )
    show_as_text(chatbot)
    box = gr.MultimodalTextbox(
        file_types=["image"],
        file_count="multiple",
        placeholder=tr("type"),
        show_label=False,
        stop_btn=True,
        max_plain_text_length=100 * args.max_text,  # longer text would become a file
    )
    with gr.Blocks(title="MiniMind-V", analytics_enabled=False, fill_height=True, delete_cache=(600, 86400)) as page:
        settings = [
            gr.Dropdown([str(path) for path in models], value=str(models[0]), label=tr("weights"), render=False),
            slider(0, 2, args.temperature, label=tr("temperature"), info=tr("temperature_info")),
            slider(min(0.05, args.top_p), 1, args.top_p, label=tr("top_p"), info=tr("top_p_info")),
            slider(1, max(2, args.max_new_tokens), args.max_new_tokens, step=1, label=tr("length")),
        ]
        gr.ChatInterface(
            on_message,
            multimodal=True,
            chatbot=chatbot,
            textbox=box,
            title="MiniMind-V",
            additional_inputs=settings,
            additional_inputs_accordion=gr.Accordion(tr("settings"), open=False, render=False),
            concurrency_limit=1,
            analytics_enabled=False,
            api_name="chat",
        )

        def suggest(weights, request: gr.Request):
            return gr.Dataset(samples=[[prompt] for prompt in prompts_of(Path(weights), language_of(request))])

        def add_sample(value, index):
            return {"text": value["text"], "files": [*value["files"], str(SAMPLES[index])]}

        def add_question(value, row):
            return {"text": row[0], "files": value["files"]}

        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        with gr.Row(elem_id="offers"):
            pictures = [[str(path)] for path in SAMPLES]
            samples = gr.Dataset(
                label=tr("samples"), components=["image"], samples=pictures, type="index", elem_id="samples"
            )
            questions = gr.Dataset(label=tr("questions"), components=["textbox"], samples=[], elem_id="questions")
        samples.click(add_sample, [box, samples], box, **quiet)
        questions.click(add_question, [box, questions], box, **quiet)
        gr.on([page.load, settings[0].change], suggest, settings[0], questions, **quiet)
    return page.queue(max_size=args.max_queue)


@contextmanager
def serve(args):
    """The page and its address, while the context lasts."""
    torch.manual_seed(args.seed)
    models = list(dict.fromkeys([find_models(args)[0], *list_models(args.out_dir)]))
    page = build_page(args, models)
    # Gradio asks its own page once before it goes on: not through a proxy of the machine,
    direct = {args.host, "localhost", *os.environ.get("no_proxy", os.environ.get("NO_PROXY", "localhost")).split(",")}
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(sorted(direct))
    _, address, _ = page.launch(
        _frontend=False,  # and not a second time with only 3 seconds to answer: a busy machine needs longer
        prevent_thread_lock=True,
        server_name=args.host,
        server_port=args.port,
        auth=[tuple(pair.split(":", 1)) for pair in args.auth] if args.auth else None,
        max_file_size=int(args.max_upload * 1e6),
        share=False,
        state_session_capacity=VISITORS,
        quiet=True,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        i18n=gr.I18n(**TEXT),
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    try:
        yield page, address.rstrip("/")
    finally:
        page.close(verbose=False)
