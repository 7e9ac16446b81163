"""Downloads from a URL. Does not import PyTorch."""

from collections.abc import Iterator


def fetch_pieces(url: str, silent: float) -> Iterator[bytes]:
    """Yields the bytes of a file on the web as they arrive.

    Raises ValueError, without the URL, if the server does not answer, answers with an error, or sends nothing for
    `silent` seconds. The caller limits the total size and time.
    """
    import requests  # here: only a URL needs it
    import urllib3

    # Without this, a server could send 50 MB that unpack to any size.
    headers = {"User-Agent": "MiniMind-V", "Accept-Encoding": "identity"}
    try:
        with requests.get(url, stream=True, timeout=silent, headers=headers) as response:
            if not response.ok:
                raise ValueError(f"the server answers {response.status_code} {response.reason}")
            # read1 returns what is there; iter_content would wait for a server that sends a byte a minute
            while piece := response.raw.read1(1 << 16, decode_content=True):
                yield piece
    except (requests.Timeout, urllib3.exceptions.ReadTimeoutError):
        raise ValueError(f"the server is silent for {silent} s") from None
    except (requests.ConnectionError, urllib3.exceptions.HTTPError):
        raise ValueError("the server cannot be reached, or broke off") from None
    except requests.RequestException as error:
        raise ValueError(str(error)) from None
