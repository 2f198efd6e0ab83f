"""Chat templates in the manner of ten model families, with their special tokens, written for these tests.

Each has what makes its family awkward: a bos, tokens that the family ends turns with, a system turn that is folded into
the first question or refused, alternation that is demanded, answers that are stripped or begin with a space, a header
for generation that answers lack, thoughts that are opened there and dropped from earlier answers, tools, dates.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.real_tokenizers import byte_level


@dataclass(frozen=True)
class Family:
    """One family's template.

    Attributes:
        template: in Jinja.
        eos: token that ends an answer.
        bos: token that its template writes first; empty if none.
        tokens: its other special tokens.
        system: it takes a system turn.
        tools: it shows tools.
        every: earlier answers stand in the whole as they do alone, so that all of them can be learned.
    """

    template: str
    eos: str
    bos: str = ""
    tokens: tuple[str, ...] = ()
    system: bool = True
    tools: bool = False
    every: bool = True

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Bytes, with the family's special tokens."""
        made = byte_level()
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        made.add_special_tokens({"eos_token": self.eos, **({"bos_token": self.bos} if self.bos else {})})
        made.add_special_tokens({"additional_special_tokens": list(self.tokens)})
        made.chat_template = self.template
        return made


# Llama 3's and Qwen's: line ends stay together, whatever follows.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and m.reasoning_content %}
            {{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}
        {%- elif loop.index0 > ns.last %}
            {{- '<think>\\n\\n</think>\\n\\n' }}
        {%- endif %}
        {{- m.content or '' }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' }}{{- call.function | tojson }}{{- '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
    "{% for m in loop_messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content %}"
    "{% else %}{% set content = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{- bos_token }}{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') }}"
    "{%- if messages[0].role == 'system' %}{{- '\\n\\n' + messages[0].content | trim }}"
    "{%- set messages = messages[1:] %}{%- endif %}{{- '<|eot_id|>' }}"
    "{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim }}"
    "{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
MISTRAL = (
    "{%- set questions = messages | selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}"
    "{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- if tools and m == questions[-1] %}{{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}"
    "{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}{{- call.function | tojson }}"
    "{{- ', ' if not loop.last }}{%- endfor %}{{- ']' + eos_token }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{%- else %}{{- raise_exception('Only user, assistant and tool roles are supported') }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token }}"
    "{% if loop.last and add_generation_prompt %}{{ '\\n<|assistant|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)
DEEPSEEK_R1 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
GRANITE = (
    "{%- if tools %}{{- '<|role|>available_tools<|role_end|>' }}{{- tools | tojson }}{{- '<|text_end|>\\n' }}"
    "{%- endif %}{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|role|>assistant<|role_end|>' }}"
    "{% generation %}{{- m.content }}{{- '<|text_end|>' }}{% endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- '<|role|>' + m.role + '<|role_end|>' + m.content + '<|text_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|role|>assistant<|role_end|>' }}{%- endif %}"
)
_IM = ("<|im_start|>",)
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>")

FAMILIES: dict[str, Family] = {
    "ChatML": Family(CHATML, "<|im_end|>", tokens=_IM),
    "Qwen 3": Family(QWEN3, "<|im_end|>", tokens=(*_IM, "<think>", "</think>"), tools=True, every=False),
    "Llama 2": Family(LLAMA2, "</s>", "<s>"),
    "Llama 3": Family(LLAMA3, "<|eot_id|>", "<|begin_of_text|>", _HEADERS),
    "Mistral": Family(MISTRAL, "</s>", "<s>", ("[INST]", "[/INST]", "[TOOL_CALLS]"), system=False, tools=True),
    "Gemma": Family(GEMMA, "<end_of_turn>", "<bos>", ("<start_of_turn>",), system=False),
    "Phi 3": Family(PHI3, "<|endoftext|>", tokens=("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")),
    "Zephyr": Family(ZEPHYR, "</s>", "<s>"),
    "DeepSeek R1": Family(DEEPSEEK_R1, "<|end|>", "<s>", ("<|User|>", "<|Assistant|>", "<think>", "</think>")),
    "Granite": Family(GRANITE, "<|text_end|>", tokens=("<|role|>", "<|role_end|>"), tools=True),
}
