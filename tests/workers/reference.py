"""Stand-alone program: answer logits by plain transformers, one sequence at a time, without verl's patches.

Usage: reference.py MODEL CASES OUTPUT. CASES is a torch file with a list of mappings: ``input_ids`` [L],
``attention_mask`` [L], ``position_ids`` [3, L], ``response_length`` R, and the pixel tensors. OUTPUT gets a
list of float32 logits [R, V], row t being the one that predicts answer token t. With
``inputs_as_embeddings`` every id is looked up as a word, placeholders too.
"""

import sys

import torch
from transformers import AutoModelForImageTextToText


@torch.no_grad()
def main(model_path: str, cases_path: str, output_path: str) -> None:
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    answers = []
    for case in torch.load(cases_path):
        num_answer = case.pop("response_length")
        batched = {name: case.pop(name)[None] for name in ("input_ids", "attention_mask")}
        positions = case.pop("position_ids")[:, None]
        if case.pop("inputs_as_embeddings", False):
            case["inputs_embeds"] = model.get_input_embeddings()(batched.pop("input_ids"))
        logits = model(**batched, position_ids=positions, **case, use_cache=False).logits[0]
        end = logits.shape[0] - 1
        answers.append(logits[end - num_answer : end].clone())
    torch.save(answers, output_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
