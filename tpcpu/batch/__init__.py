"""Many prompts from a file of JSON lines, answered into another, so that no answer is lost and none is given twice.

`lines` reads what is asked, `store` keeps what is answered, `journal` what is begun; `runner` brings them together
over the engine's scheduler. Knows files, text and requests; nothing of flags, terminals and ranks.
"""
