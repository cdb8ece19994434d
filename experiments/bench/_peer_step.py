"""The peer of `experiments.bench step`: for every line on standard input a LoRA training step of Hugging Face PEFT, or plain
products where the line says so.

Runs in an interpreter of its own with torch, transformers and peft; the argument is a JSON object of sizes.
"""

# pyright: reportMissingImports=false
import json
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

settings = json.loads(sys.argv[1])
batch, length, rank, family, products = (
    settings.pop(name) for name in ("batch", "length", "rank", "family", "products")
)
settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
if family == "roberta-base":
    model = RobertaForSequenceClassification(RobertaConfig(max_position_embeddings=514, type_vocab_size=1, **settings))
else:
    model = BertForSequenceClassification(BertConfig(**settings))
targets = ["query", "key", "value", "dense"]
lora = LoraConfig(
    task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets,
    exclude_modules=r".*(pooler|classifier).*",
)  # fmt: skip
model = get_peft_model(model, lora)
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
ids = torch.randint(5, settings["vocab_size"], (batch, length))
labels, mask = torch.randint(0, 2, (batch,)), torch.ones_like(ids)
pairs = [(torch.ones(n, i), torch.ones(i, o)) for n, i, o in products]
for line in sys.stdin:
    start = time.perf_counter()
    if line.strip() == "products":
        for x, kernel in pairs:
            torch.matmul(x, kernel)
    else:
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(time.perf_counter() - start, flush=True)
