"""The peer of `experiments.bench instructions`: LoRA of Hugging Face PEFT on a decoder, steps and evaluations as it is told.

Runs in an interpreter of its own with torch, transformers, peft and gguf. The argument is a JSON object of settings; every line
on standard input is a batch, {"ids": [[...]], "types": [[...]], "rate": learning rate, or null to evaluate}; every line on
standard output is {"seconds": s, "loss": sum over the predicted tokens, "tokens": how many}. Rows are padded to the longest.
"""

# pyright: reportMissingImports=false
import json
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

settings = json.loads(sys.argv[1])
named = {"gguf_file": settings["gguf"]} if settings["gguf"] else {}
model = AutoModelForCausalLM.from_pretrained(settings["folder"], dtype=getattr(torch, settings["dtype"]), **named)
lora = LoraConfig(
    task_type="CAUSAL_LM", r=settings["rank"], lora_alpha=2 * settings["rank"], lora_dropout=0.0, target_modules="all-linear"
)  # fmt: skip
torch.manual_seed(settings["seed"])
model = get_peft_model(model, lora)
for parameter in model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.float()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=settings["weight_decay"])
print(json.dumps({"params": sum(p.numel() for p in trained)}), flush=True)
for line in sys.stdin:
    batch = json.loads(line)
    start = time.perf_counter()
    ids, types, mask = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        for rows in (batch["ids"], batch["types"], [[1] * len(row) for row in batch["ids"]])
    )
    labels = torch.where(types == 1, ids, -100)
    tokens = int((labels[:, 1:] != -100).sum())
    if batch["rate"] is None:
        with torch.no_grad():
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    else:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings["max_grad_norm"])
        for group in optimizer.param_groups:
            group["lr"] = batch["rate"]
        optimizer.step()
        optimizer.zero_grad()
    found = {"seconds": time.perf_counter() - start, "loss": float(loss.detach()) * tokens, "tokens": tokens}
    print(json.dumps(found), flush=True)
