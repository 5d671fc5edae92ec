"""Tang poems of the four regulated forms as records and as texts to learn from; a table of who keeps the forms.

    python benchmarks/writing.py POEMS OUT

POEMS is tang.jsonl of chinese-poetry (MIT). OUT gets train.jsonl and test.jsonl (every poem whose hash is divisible by
50); a line has the title, the form, the poem, and all three as the text that a decoder learns. Then

    hanmo pretrain OUT/train.jsonl --text-field text --tokenizer char --budget 6min --out OUT/decoder
    hanmo evaluate --task writing --data OUT/test.jsonl --train OUT/train.jsonl --model OUT/decoder --limit 200

prints what a poem of the decoder is worth beside the n-gram model's and the poets' own.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

FORMS = {(4, 5): "五言绝句", (4, 7): "七言绝句", (8, 5): "五言律诗", (8, 7): "七言律诗"}
HELD_OUT = 50


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    counts = {"train": 0, "test": 0}
    with (
        (out / "train.jsonl").open("w", encoding="utf-8") as train,
        (out / "test.jsonl").open("w", encoding="utf-8") as test,
    ):
        for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            poem = "\n".join(row["paragraphs"])
            lengths = [len(part) for part in re.split("[，。\n]", poem) if part]
            plain = re.fullmatch(r"[\u3400-\u9fff\U00020000-\U0003ffff，。\n]+", poem)
            if len(set(lengths)) != 1 or (len(lengths), lengths[0]) not in FORMS or not plain or poem in seen:
                continue
            seen.add(poem)
            form = FORMS[len(lengths), lengths[0]]
            held = int(hashlib.sha256(poem.encode()).hexdigest(), 16) % HELD_OUT == 0
            text = f"{form}《{row['title']}》\n{poem}"
            record = {"title": row["title"], "form": form, "poem": poem, "text": text}
            (test if held else train).write(json.dumps(record, ensure_ascii=False) + "\n")
            counts["test" if held else "train"] += 1
    print(counts)


if __name__ == "__main__":
    main()
