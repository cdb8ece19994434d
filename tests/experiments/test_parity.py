"""Training beside PEFT on PyTorch: from the same start, on the same batches, step by step the same losses."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

import jaxprune as jp
from experiments.data.packing import Batches
from experiments.data.tokens import encode
from experiments.tasks import get_task
from jaxprune.models import SequenceClassifier, load_classifier

STEPS = 15


def test_lora_trains_like_peft(tiny_bert, tiny_rte, tmp_path):
    """Packed rows in JAX, padded rows in PyTorch: clipping, AdamW with decay, warm-up and all."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import BertForSequenceClassification, get_linear_schedule_with_warmup

    torch.manual_seed(0)
    base = BertForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    targets = ["query", "key", "value", "dense"]
    settings = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=targets, exclude_modules=r".*pooler.*"
    )
    theirs = peft.get_peft_model(base, settings).train()
    theirs.save_pretrained(tmp_path / "start")

    source = load_classifier(tiny_bert, num_labels=2)
    rates = [name for name in vars(source.config) if name.endswith("dropout")]
    model = SequenceClassifier(replace(source.config, **dict.fromkeys(rates, 0.0)))
    sites = jp.find_sites(source.params)
    adapters, masks, weights = jp.load_peft(tmp_path / "start", sites, torch_paths=source.torch_paths)
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, 1e-2, 4), optax.linear_schedule(1e-2, 0.0, STEPS - 4)], [4]
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    step = jp.make_step(jp.attach(model), get_task("rte").loss, optimizer)
    state = jp.init_state(jax.random.key(0), adapters, masks, optimizer, weights=weights)

    trained = [p for p in theirs.parameters() if p.requires_grad]
    their_optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0.01)
    their_schedule = get_linear_schedule_with_warmup(their_optimizer, 4, STEPS)
    encoded = encode(get_task("rte").rows(tiny_rte)["train"], tiny_bert, 32, cache_dir=None)
    batches = Batches(encoded, 8, seed=3)
    losses = []
    for number in range(STEPS):
        epoch, index = divmod(number, batches.steps_per_epoch)
        state, metrics = step(source.params, state, batches.batch(epoch, index))
        chosen = batches.indices(epoch, index)
        spans = [slice(encoded.offsets[i], encoded.offsets[i + 1]) for i in chosen]
        width = max(span.stop - span.start for span in spans)

        def padded(values, spans=spans, width=width):
            rows = [np.pad(values[span], (0, width - (span.stop - span.start))) for span in spans]
            return torch.tensor(np.array(rows, np.int64))

        loss = theirs(
            input_ids=padded(encoded.ids), token_type_ids=padded(encoded.type_ids),
            attention_mask=padded(np.ones_like(encoded.ids)), labels=torch.tensor(encoded.labels[chosen], dtype=torch.long),
        ).loss  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        their_optimizer.step()
        their_schedule.step()
        their_optimizer.zero_grad()
        losses.append((float(metrics["loss"]), float(loss.detach())))
    ours, others = np.array(losses).T
    np.testing.assert_allclose(ours, others, rtol=1e-3)
    np.testing.assert_allclose(ours[:5], others[:5], rtol=1e-5)
    assert np.abs(np.diff(others)).min() > 1e-4, "nothing was trained"
