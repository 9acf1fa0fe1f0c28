"""Executes the PTX of compiled Triton kernels on the CPU and checks every memory access.

The library's own host code runs as it is, on CPU tensors. Its launches are compiled for an NVIDIA target, and
what the compiler wrote is executed, without a GPU:

    with executing(arch=90) as executor:
        fastsdpo.sdpo_loss(..., backend="triton").loss.backward()
    assert not executor.faults

Reported is, with the line of Triton source: a misaligned access, one outside the buffer, a read of shared
memory or of `torch.empty` that nothing wrote, a race between warps of a program or between programs of a
launch, a barrier or a shuffle that some threads miss. ``order`` runs warps by themselves from barrier to
barrier, which a GPU may do: results then show what a race is worth.

    executor.py    `executing`: a driver for Triton whose device this is
    machine.py     the threads of several programs as numpy arrays; control flow, loads, stores, shuffles
    memory.py      a buffer, and who read and wrote each half-word of it when
    arithmetic.py  what all other instructions compute
    parse.py       PTX text to instructions

Not executed: machine code (ptxas may reorder and fuse), caches, timing, asynchronous copies, tensor cores,
atomics. An instruction that is not known raises `UnknownInstruction`.
"""
