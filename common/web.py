"""What an address holds. Without PyTorch."""

from collections.abc import Iterator


def fetch_pieces(url: str, silent: float) -> Iterator[bytes]:
    """The bytes of a file on the web as they come. Raises ValueError, without the address, for no answer, an error of
    the server, or `silent` seconds without a byte; how much and how long is for the caller to bound."""
    import requests  # here: only an address needs it
    import urllib3

    # A server that packs what is packed already could make of 50 MB any number of them.
    headers = {"User-Agent": "MiniMind-V", "Accept-Encoding": "identity"}
    try:
        with requests.get(url, stream=True, timeout=silent, headers=headers) as response:
            if not response.ok:
                raise ValueError(f"the server answers {response.status_code} {response.reason}")
            # read1: what is there, as a server may send a byte a minute, which iter_content would wait for
            while piece := response.raw.read1(1 << 16, decode_content=True):
                yield piece
    except (requests.Timeout, urllib3.exceptions.ReadTimeoutError):
        raise ValueError(f"the server is silent for {silent} s") from None
    except (requests.ConnectionError, urllib3.exceptions.HTTPError):
        raise ValueError("the server cannot be reached, or broke off") from None
    except requests.RequestException as error:
        raise ValueError(str(error)) from None
