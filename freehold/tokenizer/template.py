"""The chat template as Jinja text, for runtimes that render by themselves."""

# The same rules as `chat.render`; a test compares their text.
JINJA = r"""
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part.type != 'text' -%}
                {{- raise_exception('only text can be read') -}}
            {%- endif -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- '<|begin_of_text|>' -}}
{%- if tools -%}
    {{- '<|im_start|>system\n' -}}
    {%- if messages[0].role == 'system' and text(messages[0].content) -%}
        {{- text(messages[0].content) + '\n\n' -}}
    {%- endif -%}
    {{- 'You can call these tools:\n<tools>\n' -}}
    {%- for tool in tools -%}
        {{- tool | tojson + '\n' -}}
    {%- endfor -%}
    {{- '</tools><|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- if message.reasoning_content -%}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' -}}
        {%- endif -%}
        {{- text(message.content) -}}
        {%- if message.tool_calls -%}
            {%- for call in message.tool_calls -%}
                {%- if text(message.content) or not loop.first -%}
                    {{- '\n' -}}
                {%- endif -%}
                {{- '<tool_call>\n{"name": ' + call.function.name | tojson + ', "arguments": ' -}}
                {%- set arguments = call.function.arguments -%}
                {%- if not arguments or (arguments is string and not arguments | trim) -%}
                    {{- '{}' -}}
                {%- elif arguments is string -%}
                    {{- arguments -}}
                {%- else -%}
                    {{- arguments | tojson -}}
                {%- endif -%}
                {{- '}\n</tool_call>' -}}
            {%- endfor -%}
        {%- endif -%}
        {{- '<|im_end|>\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
            {{- '<|im_start|>user\n' -}}
        {%- endif -%}
        {{- '<tool_response>\n' + text(message.content) + '\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
            {{- '<|im_end|>' -}}
        {%- endif -%}
        {{- '\n' -}}
    {%- elif not (tools and loop.first and message.role == 'system') -%}
        {{- '<|im_start|>' + message.role + '\n' + text(message.content) + '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""".strip()
