"""The cache of an answer: keys and values of all tokens so far, which grow in place.

Shapes: B batch, K key/value heads, T new tokens, S tokens seen, d width of a head.
"""

from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 128  # tokens: by how many the cache grows


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer with room for more: a token is written behind the others, which stay where they are.

    `DynamicLayer` copies all of them for each token: with 16 answers at once a fifth of the time.
    """

    room = None  # (2, B, K, more than S, d)

    def update(self, key_states, value_states, *args, **kwargs):
        """(B, K, T, d) each → keys and values of all S tokens, (B, K, S, d)."""
        past = self.get_seq_length()
        end = past + key_states.shape[2]
        if self.room is None or end > self.room.shape[3] or self.keys.data_ptr() != self.room.data_ptr():
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            B, K, _, d = key_states.shape
            self.room = key_states.new_empty(2, B, K, end + ROOM, d)
            if past:
                self.room[0, :, :, :past], self.room[1, :, :, :past] = self.keys, self.values
        self.room[0, :, :, past:end], self.room[1, :, :, past:end] = key_states, value_states
        self.keys, self.values = self.room[:, :, :, :end]
        return self.keys, self.values


def growing_cache() -> Cache:
    return Cache(layer_class_to_replicate=GrowingLayer)
