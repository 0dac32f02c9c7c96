"""The demonstrations of the reference job, a Java program and a word problem reasoned step by step, as ids of Yuan 2.0.

Their prompts and answers of their kind go through the published tokenizer and template. The oracle is SentencePiece's
own library on pieces without special strings, which is all that the published code does besides cutting at these.
"""

import pytest
import sentencepiece

from tests.shared import shared
from tests.unit.test_tokenizer import YUAN_CONFIG
from tpcpu.text import Tokenizer, load_tokenizer

SEP, EOD = 77187, 77185
QUESTIONS = {
    "java": "请用Java编写一个程序，读入一个整数n，输出斐波那契数列的前n项。",
    "java in English": "Write a Java program that reads an integer n and prints the first n Fibonacci numbers.",
    "word problem": "小明有12个苹果，他把其中的三分之一给了妹妹，又买了5个。请问小明现在有几个苹果？请一步一步地推理。",
    "word problem in English": "A train takes 45 minutes for 60 km. How far is it in 2 hours? Think step by step.",
}
PROGRAM = """import java.util.Scanner;

public class Fibonacci {
    // 前n项
    public static void main(String[] args) {
        int n = new Scanner(System.in).nextInt();
        long a = 0, b = 1;
        for (int i = 0; i < n; i++) {
\t    System.out.println("F(" + i + ") = " + a);
            b += a;
            a = b - a;
        }
    }
}
"""
REASONING = """第一步：12 ÷ 3 = 4，小明给了妹妹4个苹果。
第二步：12 - 4 = 8，还剩8个。
第三步：8 + 5 = 13。
答案：13 个苹果。"""


@pytest.fixture(scope="module")
def yuan() -> Tokenizer:
    return load_tokenizer(shared("tokenizers/yuan2"), YUAN_CONFIG)


@pytest.fixture(scope="module")
def published() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(shared("tokenizers/yuan2") / "tokenizer.model"))


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_is_its_pieces_and_a_separator(yuan, published, name):
    """Neither BOS nor EOS, whatever the folder's tokenizer_config.json says."""
    question = QUESTIONS[name]
    ids = yuan.encode_chat([{"role": "user", "content": question}])
    assert ids == [*published.encode(question), published.piece_to_id("<sep>")]
    assert ids == yuan.encode(f"{question}<sep>")
    assert (published.piece_to_id("<sep>"), published.piece_to_id("<eod>")) == (SEP, EOD)
    assert EOD not in ids
    assert published.unk_id() not in ids
    assert yuan.decode(ids) == question
    assert yuan.decode(ids, skip_special=False) == f"{question}<sep>"


@pytest.mark.parametrize("answer", [PROGRAM, REASONING], ids=["program", "reasoning"])
def test_an_answer_comes_back_as_it_was_also_token_by_token(yuan, published, answer):
    """Indentation, tabs and line ends of a program count."""
    ids = yuan.encode(answer)
    assert ids == published.encode(answer)
    assert yuan.decode(ids) == answer
    stream = yuan.detokenizer()
    assert "".join([*(stream.push(number) for number in ids), stream.flush()]) == answer
    assert yuan.stop_ids == {EOD}
    assert yuan.decode([*ids, EOD]) == answer


def test_a_second_question_goes_on_from_the_first(yuan, published):
    """Turns are joined by <n>, which is no token of its own, and only the last ends with the separator."""
    first, second = QUESTIONS["word problem"], "如果又吃了2个呢？"
    conversation = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": REASONING},
        {"role": "user", "content": second},
    ]
    assert yuan.encode_chat(conversation) == [*published.encode(f"{first}<n>{REASONING}<n>{second}"), SEP]
