"""The web page: its texts in English and Chinese, its elements, and what happens when a visitor asks something.

The server keeps nothing between visitors except the loaded models. A conversation lives in its browser tab, its
pictures in a folder that is deleted when the process ends.
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
VISITORS = 500  # conversations that Gradio keeps, 50 KB each; its default is 10,000

TEXT = {
    "en": {
        "hello": "**Add a picture and ask about it.**\n\nUpload, paste or drop one, or pick a sample below.",
        "type": "Ask about a picture",
        "samples": "Sample pictures",
        "questions": "Questions from its training",
        "settings": "Settings",
        "weights": "Model",
        "temperature": "Temperature",
        "temperature_info": "0: always the most likely word; higher: more varied answers",
        "top_p": "Top-p",
        "top_p_info": "Sample from the most likely words that make up this share",
        "length": "Maximum length of an answer, in tokens",
        "seen": "Pictures seen: {n}",
        "unseen": "There is no picture, and this model was never trained without one",
        "earlier": " ({n} from earlier turns)",
        "took": "{tokens} tokens in {seconds:.2f} s",
        "late": "stopped at the limit of {seconds:g} s",
        "forgotten": "the conversation is too long: its first {n} turns were left out",
        "empty": "Type a question, or add a picture.",
        "long": "The text has {n} characters; the limit is {limit}. Please shorten it.",
        "many": "You added {n} pictures; the limit is {limit} per question.",
        "pixels": "{name} has more than {limit:g} million pixels. Please use a smaller picture.",
        "broken": "{name} cannot be read as a picture. Use JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF.",
        "tags": "The text contains {tag} {n} times, but there are {pictures} pictures. "
        "Write it once for each picture, or leave it out.",
        "room": "The question is longer than the {limit} tokens that the model reads. Use less text or fewer pictures.",
        "run": "The text has so many {sign} in a row that the model would read them as a picture.",
        "memory": "The machine ran out of memory. Try again with fewer pictures, or clear the conversation.",
        "failed": "Sorry, something went wrong. See the log of the server.",
    },
    "zh": {
        "hello": "**添加一张图片，然后提问。**\n\n可以上传、粘贴或拖入图片，也可以用下面的示例图片。",
        "type": "输入关于图片的问题",
        "samples": "示例图片",
        "questions": "训练时常见的问题",
        "settings": "设置",
        "weights": "模型",
        "temperature": "温度",
        "temperature_info": "为 0 时总是选概率最高的词；越高，回答越多样",
        "top_p": "Top-p",
        "top_p_info": "从概率最高的词开始累加，只在累计概率达到该值的范围内采样",
        "length": "回答的最大长度（token 数）",
        "seen": "模型看到 {n} 张图片",
        "unseen": "没有图片，而这个模型的训练数据都带图片",
        "earlier": "（其中 {n} 张来自前几轮）",
        "took": "{tokens} 个 token，用时 {seconds:.2f} 秒",
        "late": "达到 {seconds:g} 秒上限，已停止",
        "forgotten": "对话过长，最早的 {n} 轮已略去",
        "empty": "请输入问题，或添加一张图片。",
        "long": "文字共 {n} 个字符，上限为 {limit} 个，请缩短。",
        "many": "共 {n} 张图片，每次提问最多 {limit} 张。",
        "pixels": "{name} 超过 {limit:g} 百万像素，请缩小后再试。",
        "broken": "无法读取图片 {name}。支持 JPEG、PNG、WebP、GIF、BMP、TIFF 和 AVIF。",
        "tags": "文字中有 {n} 个 {tag}，图片却有 {pictures} 张。两者数量要一致，也可以都不写。",
        "room": "问题过长，超过模型能处理的 {limit} 个 token。请减少文字或图片。",
        "run": "文字中连续的 {sign} 太多，会被模型当作图片。",
        "memory": "内存不足。请减少图片，或清空对话后再试。",
        "failed": "抱歉，出错了。详情见服务器日志。",
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
    """Makes the chatbot show text as it is. Gradio would render the HTML in it, although sanitized.

    Accepts only text and files from the browser: given a forged message with a component in it, Gradio would copy any
    file of this machine into the folder that it serves.
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
    """Returns a message that is not an answer: "seen" is about an answer, a "notice" takes the place of one."""
    return {"role": "assistant", "content": content, "metadata": {"id": mark, **metadata}}


def language_of(request: gr.Request) -> str:
    return "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"


def build_page(args, models: list[Path]) -> gr.Blocks:
    # Gradio admits one question at a time from the page, and one through the API. With the lock only one of them at a
    # time loads models, reads pictures and generates.
    lock, loaded = threading.Lock(), {}  # {path: (model, tokenizer)}, the most recently used one last

    def get_model(path):
        pair = loaded.pop(path, None)
        if not pair:
            while len(loaded) >= MOST_LOADED:  # free the memory before the next model needs it
                del loaded[next(iter(loaded))]
            pair = load_for_page(Path(path), args)
        loaded[path] = pair
        return pair

    get_model(str(models[0]))  # reports an error before there is a page

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
        """Ask about pictures: text and files, the model's path, temperature (0: greedy), top-p, maximum length."""
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
    """Serves the page while the context lasts; yields the page and its address."""
    torch.manual_seed(args.seed)
    models = list(dict.fromkeys([find_models(args)[0], *list_models(args.out_dir)]))
    page = build_page(args, models)
    # Gradio requests its own page once before it continues. This must not go through the machine's proxy,
    direct = {args.host, "localhost", *os.environ.get("no_proxy", os.environ.get("NO_PROXY", "localhost")).split(",")}
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(sorted(direct))
    _, address, _ = page.launch(
        _frontend=False,  # nor happen twice: the second request allows 3 seconds, too few on a busy machine
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
