"""A tiny model learns a preference from follow-ups alone, until it holds without them.

The model is trained from scratch to answer a topic with one of four styles: any of them, or the one
that a note in the message asks for. Then interactions come in whose answers have a random style and
whose follow-ups ask for one and the same. Chance is 1/4; the model with the note is the ceiling.
"""

import random

import torch


def rendered(tokenizer, content):
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pretrain(lab, tokenizer, topics, styles, asks, steps):
    model = lab.make_model(initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    draw = random.Random(0)
    for _ in range(steps):
        rows = []
        for _ in range(64):
            topic, style = draw.choice(topics), draw.randrange(4)
            content = topic if draw.random() < 0.5 else f"{topic} note {asks[style]}"
            prompt = rendered(tokenizer, content)
            answer = f"{styles[style]} {topic} <end>"
            rows.append((prompt, tokenizer(answer, add_special_tokens=False)["input_ids"]))
        width = max(len(p) + len(a) for p, a in rows)
        ids = torch.zeros(64, width, dtype=torch.long)
        labels = torch.full((64, width), -100)
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : end] = torch.tensor(answer)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def probability(model, tokenizer, topics, style, note=None):
    """Mean probability that an answer begins with the style."""
    found = 0.0
    for topic in topics:
        content = topic if note is None else f"{topic} note {note}"
        ids = torch.tensor([rendered(tokenizer, content)])
        p = model(input_ids=ids).logits[0, -1].softmax(-1)
        found += float(p[tokenizer.convert_tokens_to_ids(style)]) / len(topics)
    return found


def test_follow_ups_alone_teach_the_preference(lab, tmp_path):
    from fastsdpo import Interaction

    torch.manual_seed(0)
    tokenizer = lab.make_tokenizer()
    topics, styles, asks = lab.WORDS[:16], lab.WORDS[40:44], lab.WORDS[50:54]
    model = pretrain(lab, tokenizer, topics, styles, asks, steps=120)
    wanted = 2
    chance = probability(model, tokenizer, topics, styles[wanted])
    ceiling = probability(model, tokenizer, topics, styles[wanted], asks[wanted])
    assert 0.1 < chance < 0.45
    assert ceiling > 0.9

    draw = random.Random(1)
    interactions = [
        Interaction([{"role": "user", "content": topic}], f"{styles[draw.randrange(4)]} {topic}", asks[wanted])
        for i in range(12)
        for topic in topics[:12]  # the other four topics are held out
    ]
    settings = {"learning_rate": 5e-4, "num_train_epochs": 2, "per_device_train_batch_size": 12}
    trainer = lab.make_trainer(tmp_path, model=model, interactions=interactions, **settings)
    trainer.train()
    after = probability(model, tokenizer, topics[12:], styles[wanted])
    assert after > chance + 0.5 * (ceiling - chance)
