"""Does a file say to its clients what it says to us? Readers that share no code with what wrote it, and a verdict.

    layout       which tensors a model of a version has
    contents     what a reader found in a file
    pth, web_rwkv, gguf_file, hf
                 readers, one for a format: written from the rules of its clients alone
    recurrence   the models' equations in numpy
    rwkv_package, llama
                 the clients themselves, where they are installed
    child        runs either in a process of its own
    structure    what can be checked without running the model
    core         rwkv_core.models on the same rounded tensors: the measure
    check        a file, against the model that it was made from
    exports      all files of an export
    report       the verdict, to read

No reader imports `rwkv_core.models` or `rwkv_core.formats`: only `core`, `check` and `exports` know what we think of a file.
"""
