#!/usr/bin/env python3
"""Runs a statically linked x86-64 Linux program on an emulated CPU: that of Bochs, without the PC around it.

    emulate.py --emulator FILE [--cpu NAME] [--env NAME=VALUE]... PROGRAM [ARGUMENT]...

FILE is the extension module of the wheel `bochscpu-python`. Of it only the C functions are used, through ctypes, so any
Python will do. The program sees one CPU with all that NAME has, AVX-512 included, whatever this machine is.

How it works:

* Memory. A guest address is a physical address is an offset into one reservation of host memory. Page tables are 256
  entries of 1 GiB; what is mapped is a list of ranges, asked when the emulator touches a page for the first time. So a
  wild access is caught, and so is one to a guard page or to what was unmapped; only write protection isn't kept.
* System calls. SYSCALL enters ring 0 at a page whose only instruction there is SYSRET. The emulator stops as it gets
  there, Python does what the kernel would, and running on returns to the program. Nothing else leaves the emulator, so
  the time goes into emulated instructions. What the program asks of the kernel is little, and an unknown call ends the
  run. It gets no files and no network; time passes by looking at the clock and by sleeping; random numbers are always
  the same ones.
* Threads. One runs until it waits (futex, sleep, yield) or ends; then the next. General registers are kept in Python,
  the others by XSAVE and XRSTOR, which the ring 0 page has too. Threads that wait for each other forever end the run.
* One instruction of AVX-512 is refused by Bochs 3.0 though it is valid: a gather whose index register is one of the upper
  16 (it takes the fifth bit of that register for a register that the instruction doesn't have). See `detour`.

The exit status is the program's; 125 says that the emulator could not be used at all, 126 that the program crashed or
asked for something that isn't there.
"""

import argparse
import bisect
import ctypes
import errno
import os
import struct
import sys
from ctypes import c_int, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p

PAGE = 0x1000
GUEST_BYTES = 256 << 30
# Below the program, in guest memory: page tables, the ring 0 page, and a place for every thread's vector registers.
PML4, PDPT, RING0, DETOURS, SPILL = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
XSAVE_AREAS, XSAVE_BYTES, MAX_THREADS = 0x10000, 0x1000, 256
PROGRAM_BASE = 1 << 30  # for position-independent programs
STACK_TOP, STACK_BYTES = 6 << 30, 8 << 20
MMAP_START = 8 << 30

# Ring 0: where SYSCALL enters, and what changes vector registers (rdi: where to save, rsi: from where to restore).
SYSRET = bytes.fromhex("480f07")
SWITCH = 0x10
SWITCH_CODE = bytes.fromhex("480fae27 480fae2e 0f05")  # xsave64 [rdi]; xrstor64 [rsi]; syscall

# Bochs' numbers of general registers, as `cpu_get_reg64` wants them.
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 = range(16)
ES, CS, SS, DS, FS, GS = range(6)

# CPUs by their places in the emulator's list; what follows is XCR0, the registers that the kernel lets programs use.
CPUS = {
    "haswell": (24, 0x07),
    "tigerlake": (29, 0xE7),
    "sapphire_rapids": (30, 0xE7),
    "arrow_lake": (31, 0x07),
}


class Failure(Exception):
    """The program can't go on, or the emulator can't be used: (exit status, message)."""


class Emulator:
    """The C functions of the extension module."""

    HOOKS = 26
    EXCEPTION, FAR_BRANCH = 10, 7
    SYSCALL_BRANCH = 17

    def __init__(self, path, cpu):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.dlopen.restype = c_void_p
        libc.dlerror.restype = ctypes.c_char_p
        # Lazy: functions of Python or of a newer libc that the module needs and this process lacks are never called.
        handle = libc.dlopen(os.fsencode(os.path.abspath(path)), 1)
        if not handle:
            raise Failure(125, libc.dlerror().decode(errors="replace"))
        self.lib = ctypes.CDLL(path, handle=handle)
        try:
            self._choose(cpu)
            self._declare()
        except AttributeError as missing:
            raise Failure(125, f"{path}: {missing}") from None
        self.cpu = self.lib.bochscpu_cpu_new(0)

    def _choose(self, cpu):
        find = self.lib.sim_get_param_enum
        find.restype, find.argtypes = c_void_p, [ctypes.c_char_p]
        choose = self.lib._ZN15bx_param_enum_c3setEl
        choose.restype, choose.argtypes = None, [c_void_p, ctypes.c_int64]
        choose(find(b"cpu.model"), CPUS[cpu][0])

    def _declare(self):
        def function(name, result, *arguments):
            f = getattr(self.lib, name)
            f.restype, f.argtypes = result, arguments
            return f

        function("bochscpu_cpu_new", c_void_p, c_uint32)
        self._run = function("bochscpu_cpu_run", None, c_void_p, c_void_p)
        self._stop = function("bochscpu_cpu_stop", None, c_void_p)
        self._missing = function("bochscpu_mem_missing_page", None, c_void_p)
        self.page_insert = function("bochscpu_mem_page_insert", None, c_uint64, c_void_p)
        self.page_remove = function("bochscpu_mem_page_remove", None, c_uint64)
        self._get = function("cpu_get_reg64", c_uint64, c_uint32, c_uint32)
        self._set = function("cpu_set_reg64", None, c_uint32, c_uint32, c_uint64)
        self._set_segment = function(
            "cpu_set_seg", None, c_uint32, c_uint32, c_uint32, c_uint16, c_uint64, c_uint32, c_uint16
        )
        self._get_pc = function("cpu_get_pc", c_uint64, c_uint32)
        self._set_pc = function("cpu_set_pc", None, c_uint32, c_uint64)
        self._get_cr2 = function("cpu_get_cr2", c_uint64, c_uint32)
        self._set_mode = function("cpu_set_mode", None, c_uint32)
        for name, kind in {
            "cr0": c_uint32, "cr3": c_uint64, "cr4": c_uint32, "efer": c_uint32, "xcr0": c_uint32, "star": c_uint64,
            "lstar": c_uint64, "fmask": c_uint32, "eflags": c_uint32, "mxcsr": c_uint32, "fp_cw": c_uint16,
            "fp_tw": c_uint16,
        }.items():  # fmt: skip
            function(f"cpu_set_{name}", None, c_uint32, kind)

    def hook(self, on_syscall, on_exception, on_missing_page):
        """Says what to call; each may end the run with `stop`."""

        def far_branch(_context, _cpu, what, _old_cs, _old_rip, _new_cs, _new_rip):
            if what == self.SYSCALL_BRANCH:
                on_syscall()

        def exception(_context, _cpu, vector, code):
            on_exception(vector, code)

        far = ctypes.CFUNCTYPE(None, c_void_p, c_uint32, c_uint32, c_uint16, c_uint64, c_uint16, c_uint64)(far_branch)
        bad = ctypes.CFUNCTYPE(None, c_void_p, c_uint32, c_uint32, c_uint32)(exception)
        page = ctypes.CFUNCTYPE(None, c_uint64)(on_missing_page)
        table = (c_void_p * self.HOOKS)()
        table[self.FAR_BRANCH] = ctypes.cast(far, c_void_p)
        table[self.EXCEPTION] = ctypes.cast(bad, c_void_p)
        chain = (c_void_p * 2)(ctypes.addressof(table), None)
        self._missing(ctypes.cast(page, c_void_p))
        self._chain = ctypes.addressof(chain)
        self._keep = (far, bad, page, table, chain)

    def set(self, name, value):
        getattr(self.lib, f"cpu_set_{name}")(0, value)

    def segment(self, register, selector, base, attributes):
        self._set_segment(0, register, 1, selector, base, 0xFFFFFFFF, attributes)

    def set_fs(self, base):
        self.segment(FS, 0, base, 0xC0F3)

    def get(self, register):
        return self._get(0, register)

    def put(self, register, value):
        self._set(0, register, value & (1 << 64) - 1)

    pc = property(lambda self: self._get_pc(0), lambda self, value: self._set_pc(0, value))
    fault_address = property(lambda self: self._get_cr2(0))

    def run(self):
        self._run(self.cpu, self._chain)

    def stop(self):
        self._stop(self.cpu)

    def forget_translations(self):
        self._set_mode(0)


class Memory:
    """Guest memory: which ranges are mapped, and their bytes."""

    def __init__(self, emulator):
        self.emulator = emulator
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = c_void_p
        self.libc.mmap.argtypes = [c_void_p, c_size_t, c_int, c_int, c_int, ctypes.c_long]
        self.libc.mprotect.argtypes = [c_void_p, c_size_t, c_int]
        self.libc.madvise.argtypes = [c_void_p, c_size_t, c_int]
        # PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE: address space, no memory.
        self.base = self.libc.mmap(None, GUEST_BYTES, 0, 0x4022, -1, 0)
        if self.base in (None, c_void_p(-1).value):
            raise Failure(125, f"{GUEST_BYTES >> 30} GiB of address space: {os.strerror(ctypes.get_errno())}")
        self.starts, self.ends = [], []  # what may be touched, sorted
        self.present = set()  # pages that the emulator knows
        self.next = MMAP_START
        self.stale = False

    def allowed(self, address):
        at = bisect.bisect_right(self.starts, address) - 1
        return at >= 0 and address < self.ends[at]

    def _cut(self, start, end):
        first = bisect.bisect_right(self.ends, start)
        last = bisect.bisect_left(self.starts, end)
        starts, ends = self.starts[first:last], self.ends[first:last]
        left = [(s, start) for s in starts[:1] if s < start]
        right = [(end, e) for e in ends[-1:] if e > end]
        self.starts[first:last] = [s for s, _ in left + right]
        self.ends[first:last] = [e for _, e in left + right]

    def allow(self, start, end):
        """Maps whole pages; their bytes are what they were, zeros at first."""
        self._cut(start, end)
        at = bisect.bisect_left(self.starts, start)
        self.starts.insert(at, start)
        self.ends.insert(at, end)
        self._host(self.libc.mprotect, start, end, 3)

    def forbid(self, start, end, forget):
        """Unmaps whole pages, or only guards them."""
        self._cut(start, end)
        pages = range(start, end, PAGE) if end - start < len(self.present) * PAGE else sorted(self.present)
        for page in pages:
            if start <= page < end and page in self.present:
                self.present.remove(page)
                self.emulator.page_remove(page)
                self.stale = True
        if forget:
            self._host(self.libc.madvise, start, end, 4)  # MADV_DONTNEED
        self._host(self.libc.mprotect, start, end, 0)

    def _host(self, call, start, end, argument):
        if end > GUEST_BYTES or call(self.base + start, end - start, argument) != 0:
            raise Failure(126, f"guest memory {start:#x}..{end:#x}: {os.strerror(ctypes.get_errno())}")

    def reserve(self, size, align=PAGE):
        """Addresses that nobody had before: what was unmapped is never handed out again."""
        start = -(-self.next // align) * align
        self.next = start + size + PAGE
        return start

    def touch(self, page):
        """Makes a page known to the emulator; false if it isn't mapped."""
        page &= -PAGE
        if not self.allowed(page):
            return False
        self.present.add(page)
        self.emulator.page_insert(page, self.base + page)
        return True

    def check(self, address, size):
        if size and not all(self.allowed(page) for page in range(address & -PAGE, address + size, PAGE)):
            raise OSError(errno.EFAULT, "bad address")

    def read(self, address, size):
        self.check(address, size)
        return ctypes.string_at(self.base + address, size)

    def write(self, address, data):
        self.check(address, len(data))
        ctypes.memmove(self.base + address, data, len(data))

    def read_int(self, address, size):
        return int.from_bytes(self.read(address, size), "little")


def load(memory, path, arguments, environment):
    """Maps the program and its stack as execve would; gives (entry point, stack pointer, end of the program)."""
    with open(path, "rb") as file:
        image = file.read()
    if image[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", image, 18)[0] != 62:
        raise Failure(126, f"{path}: not an x86-64 ELF program")
    kind, = struct.unpack_from("<H", image, 16)  # fmt: skip
    entry, table = struct.unpack_from("<QQ", image, 24)
    entry_bytes, entries = struct.unpack_from("<HH", image, 54)
    base = PROGRAM_BASE if kind == 3 else 0
    end = 0
    headers = 0
    for at in range(table, table + entries * entry_bytes, entry_bytes):
        kind, _, offset, address, _, in_file, in_memory, _ = struct.unpack_from("<IIQQQQQQ", image, at)
        if kind == 3:
            raise Failure(126, f"{path}: dynamically linked; link it with -C target-feature=+crt-static")
        if kind == 1:
            memory.allow(base + address & -PAGE, base + address + in_memory + PAGE - 1 & -PAGE)
            memory.write(base + address, image[offset : offset + in_file])
            end = max(end, base + address + in_memory)
            if offset <= table < offset + in_file:
                headers = base + address + table - offset
    memory.allow(STACK_TOP - STACK_BYTES, STACK_TOP)
    top = STACK_TOP - 16

    def push(data):
        nonlocal top
        top -= len(data)
        memory.write(top, data)
        return top

    random = push(bytes(range(16)))
    name = push(os.fsencode(path) + b"\0")
    argv = [push(os.fsencode(argument) + b"\0") for argument in [path, *arguments]]
    envp = [push(os.fsencode(variable) + b"\0") for variable in environment]
    auxiliary = {
        3: headers, 4: entry_bytes, 5: entries, 6: PAGE, 7: 0, 9: base + entry, 11: 1000, 12: 1000, 13: 1000, 14: 1000,
        17: 100, 23: 0, 25: random, 31: name, 51: 4096,
    }  # fmt: skip
    words = [len(argv), *argv, 0, *envp, 0, *(word for pair in auxiliary.items() for word in pair), 0, 0]
    top = (top - 8 * len(words)) & -16
    memory.write(top, struct.pack(f"<{len(words)}Q", *words))
    return base + entry, top, end + PAGE - 1 & -PAGE


class Thread:
    def __init__(self, tid):
        self.tid = tid
        self.registers = [0] * 16
        self.fs = 0
        self.clear_tid = 0
        self.futex = None  # (address, bits) while it waits for one
        self.deadline = None  # while it sleeps

    @property
    def area(self):
        return XSAVE_AREAS + (self.tid - 1) % MAX_THREADS * XSAVE_BYTES

    def runs(self):
        return self.futex is None and self.deadline is None


class Kernel:
    """What the program believes to be Linux."""

    def __init__(self, emulator, cpu, path, arguments, environment):
        self.emulator = emulator
        self.memory = memory = Memory(emulator)
        self.fault = self.vector = None
        self.now = 1_700_000_000 * 10**9  # ns
        self.random = 0
        self.threads = [Thread(1)]
        self.current = self.threads[0]
        self.last_tid = 1
        emulator.hook(emulator.stop, self.on_exception, self.on_missing_page)

        memory.allow(PML4, SPILL + PAGE)
        self.detours = {}
        memory.allow(XSAVE_AREAS, XSAVE_AREAS + MAX_THREADS * XSAVE_BYTES)
        memory.write(PML4, struct.pack("<Q", PDPT | 7))
        memory.write(PDPT, struct.pack("<256Q", *(gib << 30 | 0x87 for gib in range(256))))
        memory.write(RING0, SYSRET)
        memory.write(RING0 + SWITCH, SWITCH_CODE)
        entry, stack, self.heap = load(memory, path, arguments, environment)
        self.heap_start = self.heap

        for name, value in {
            "cr0": 0x80010033,  # paging, write protection, floating point errors, protected mode
            "cr3": PML4,
            "cr4": 0x40620,  # page tables of 64 bits, SSE, XSAVE
            "efer": 0xD01,  # SYSCALL, long mode
            "xcr0": CPUS[cpu][1],
            "star": 0x13 << 48 | 0x08 << 32,
            "lstar": RING0,
            "fmask": 0x200,
            "eflags": 2,
            "mxcsr": 0x1F80,
            "fp_cw": 0x37F,
            "fp_tw": 0xFFFF,
        }.items():
            emulator.set(name, value)
        # As if the program's first instruction had been SYSCALL.
        emulator.segment(CS, 0x08, 0, 0xA09B)
        for register in (SS, DS, ES, GS):
            emulator.segment(register, 0x10, 0, 0xC093)
        emulator.set_fs(0)
        for register in range(16):
            emulator.put(register, 0)
        emulator.put(RCX, entry)
        emulator.put(RSP, stack)
        emulator.put(R11, 0x202)
        emulator.pc = RING0
        emulator.forget_translations()

    def on_exception(self, vector, code):
        names = {0: "#DE division", 3: "#BP breakpoint", 6: "#UD invalid instruction", 13: "#GP general protection",
                 14: "#PF page fault", 16: "#MF x87", 17: "#AC alignment", 19: "#XM SIMD floating point"}  # fmt: skip
        where = f" at address {self.emulator.fault_address:#x}" if vector == 14 else ""
        self.vector = vector
        self.fault = f"{names.get(vector, f'exception {vector}')} (error code {code:#x}){where}"
        self.emulator.stop()

    def on_missing_page(self, address):
        if not self.memory.touch(address):
            self.fault = f"access to the page at {address & -PAGE:#x}, which isn't mapped"
            self.emulator.stop()

    def step(self):
        """Runs until the next system call."""
        if self.memory.stale:
            self.emulator.forget_translations()
            self.memory.stale = False
        self.emulator.run()
        while self.fault and self.detour():
            self.emulator.run()
        if self.fault:
            raise Failure(126, f"crash: {self.fault}, instruction at {self.emulator.pc:#x} (a position-independent "
                               f"program starts at {PROGRAM_BASE:#x})")  # fmt: skip
        if self.emulator.pc != RING0:
            raise Failure(126, f"the emulator stopped at {self.emulator.pc:#x}")

    def detour(self):
        """Executes the gather that was refused, if it was one, with its index in a register below 16.

        The same instruction with that register stands in a page of its own, between a store and a load of what the
        register held, and before an invalid instruction that brings the control back.
        """
        after = self.emulator.pc
        if self.vector != 6:
            return False
        for length, mode in ((7, 0), (8, 1), (11, 2)):  # of the displacement
            code = self.memory.read(after - length, length)
            prefix, p0, _, p2, opcode, modrm, sib = code[:7]
            # EVEX map 2, VPGATHERDD to VGATHERQPD, an address with an index, which is 16 or more.
            gathers = prefix == 0x62 and p0 & 7 == 2 and 0x90 <= opcode <= 0x93
            if gathers and modrm >> 6 == mode and modrm & 7 == 4 and not p2 & 8:
                break
        else:
            return False
        if code not in self.detours:
            spare = 1 if not modrm >> 3 & 7 else 0  # whatever the upper bits of the destination
            index = 16 | (~p0 >> 3 & 8) | sib >> 3 & 7
            start = max((end for _, end in self.detours.values()), default=DETOURS)
            body = bytes([0x62, p0 | 0x40, code[2], p2 | 8, opcode, modrm, sib & 0xC7 | spare << 3]) + code[7:]
            move = bytes([0x62, 0x91 | (0 if index & 8 else 0x20), 0xFD, 0x48, 0x6F, 0xC0 | spare << 3 | index & 7])

            def spill(opcode, at):
                return bytes([0x62, 0xF1, 0xFE, 0x48, opcode, spare << 3 | 5]) + struct.pack("<i", SPILL - at - 10)

            text = spill(0x7F, start) + move + body
            text += spill(0x6F, start + len(text)) + b"\x0f\x0b"
            if start + len(text) > DETOURS + PAGE:
                raise Failure(126, "more refused gathers than one page holds")
            self.memory.write(start, text)
            self.detours[code] = (start, start + len(text))
        start, end = self.detours[code]
        self.fault = None
        self.emulator.pc = start
        self.emulator.run()
        if self.vector != 6 or self.emulator.pc != end:
            return False
        self.fault = None
        self.emulator.pc = after
        return True

    def run(self):
        while True:
            self.step()
            get = self.emulator.get
            number = get(RAX)
            arguments = [get(r) for r in (RDI, RSI, RDX, R10, R8, R9)]
            call = CALLS.get(number)
            if call is None:
                raise Failure(126, f"system call {number} isn't there")
            try:
                result = call(self, *arguments)
            except OSError as error:
                result = -error.errno
            if isinstance(result, Exit):
                return result.status
            if result is not None:
                self.emulator.put(RAX, result)
            if self.current is None or not self.current.runs():
                self.switch()

    # Threads.

    def expire(self):
        """Wakes who has waited long enough."""
        for thread in self.threads:
            if thread.deadline is not None and thread.deadline <= self.now:
                # A futex that timed out says so; a sleep is done.
                result = -errno.ETIMEDOUT if thread.futex else 0
                thread.registers[RAX] = result
                if thread is self.current:
                    self.emulator.put(RAX, result)
                thread.futex = thread.deadline = None

    def switch(self):
        """Lets another thread run: the next one in turn, or the one that wakes first."""
        while not any(thread.runs() for thread in self.threads):
            waking = [thread for thread in self.threads if thread.deadline is not None]
            if not waking:
                raise Failure(126, "all threads wait for each other")
            self.now = max(self.now, min(thread.deadline for thread in waking))
            self.expire()
        order = sorted(self.threads, key=lambda t: (self.current is not None and t.tid <= self.current.tid, t.tid))
        following = next(thread for thread in order if thread.runs())
        if following is self.current:
            return
        self.exchange(self.current, following)
        self.current = following
        for register, value in enumerate(following.registers):
            self.emulator.put(register, value)
        self.emulator.set_fs(following.fs)

    def exchange(self, old, new):
        """Saves the registers of `old`, if it goes on later, and loads the vector registers of `new`."""
        if old is not None:
            old.registers = [self.emulator.get(register) for register in range(16)]
        # The last place is nobody's.
        self.emulator.put(RDI, old.area if old is not None else XSAVE_AREAS + (MAX_THREADS - 1) * XSAVE_BYTES)
        self.emulator.put(RSI, new.area)
        self.emulator.put(RAX, 0xFFFFFFFF)
        self.emulator.put(RDX, 0xFFFFFFFF)
        self.emulator.pc = RING0 + SWITCH
        self.step()

    def wake(self, address, count, bits=0xFFFFFFFF):
        woken = 0
        for thread in self.threads:
            if woken < count and thread.futex and thread.futex[0] == address and thread.futex[1] & bits:
                thread.futex = thread.deadline = None
                thread.registers[RAX] = 0
                woken += 1
        return woken

    def clone(self, flags, stack, parent_tid, child_tid, tls, _=0):
        if flags & 0x00050F00 != 0x00050F00:  # memory, files, signals, being a thread
            raise OSError(errno.ENOSYS, "fork")
        if len(self.threads) >= MAX_THREADS - 2:
            raise OSError(errno.EAGAIN, "threads")
        taken = {thread.area for thread in self.threads}
        self.last_tid += 1
        while Thread(self.last_tid).area in taken or self.last_tid % MAX_THREADS == 0:
            self.last_tid += 1
        child = Thread(self.last_tid)
        self.exchange(self.current, self.current)
        for register, value in enumerate(self.current.registers):
            self.emulator.put(register, value)
        self.memory.write(child.area, self.memory.read(self.current.area, XSAVE_BYTES))
        child.registers = list(self.current.registers)
        child.registers[RAX], child.registers[RSP] = 0, stack
        child.fs = tls if flags & 0x00080000 else self.current.fs
        if flags & 0x00100000:
            self.memory.write(parent_tid, struct.pack("<I", child.tid))
        if flags & 0x01000000:
            self.memory.write(child_tid, struct.pack("<I", child.tid))
        if flags & 0x00200000:
            child.clear_tid = child_tid
        self.threads.append(child)
        return child.tid

    def exit_thread(self, status, *_):
        if self.current.clear_tid:
            self.memory.write(self.current.clear_tid, bytes(4))
            self.wake(self.current.clear_tid, 1)
        self.threads.remove(self.current)
        self.current = None
        return None if self.threads else Exit(status)

    def futex(self, address, operation, value, timeout, _address2, bits):
        command = operation & 0x7F
        if command in (1, 10):  # wake
            return self.wake(address, value, bits if command == 10 else 0xFFFFFFFF)
        if command not in (0, 9):
            raise OSError(errno.ENOSYS, "futex")
        if self.memory.read_int(address, 4) != value & 0xFFFFFFFF:
            raise OSError(errno.EAGAIN, "futex")
        if timeout:
            seconds, nanoseconds = struct.unpack("<qq", self.memory.read(timeout, 16))
            self.current.deadline = seconds * 10**9 + nanoseconds + (self.now if command == 0 else 0)
        self.current.futex = (address, bits if command == 9 else 0xFFFFFFFF)
        return 0

    def sleep(self, _clock, flags, request, *_):
        seconds, nanoseconds = struct.unpack("<qq", self.memory.read(request, 16))
        self.current.deadline = seconds * 10**9 + nanoseconds + (0 if flags & 1 else self.now)
        return 0

    def give_way(self, *_):
        self.emulator.put(RAX, 0)
        self.now += 1000
        self.expire()
        self.switch()

    # Memory.

    def mmap(self, address, size, protection, flags, *_):
        size = size + PAGE - 1 & -PAGE
        if not size or not flags & 0x20:
            raise OSError(errno.ENODEV if size else errno.EINVAL, "mmap")
        if flags & 0x10:  # MAP_FIXED
            self.memory.forbid(address, address + size, forget=True)
        else:
            address = self.memory.reserve(size)
        if protection:
            self.memory.allow(address, address + size)
        return address

    def munmap(self, address, size, *_):
        self.memory.forbid(address, address + size + PAGE - 1 & -PAGE, forget=True)
        return 0

    def mprotect(self, address, size, protection, *_):
        end = address + size + PAGE - 1 & -PAGE
        if protection:
            self.memory.allow(address, end)
        else:
            self.memory.forbid(address, end, forget=False)
        return 0

    def mremap(self, old, old_size, size, flags, *_):
        old_size, size = old_size + PAGE - 1 & -PAGE, size + PAGE - 1 & -PAGE
        if size <= old_size:
            if size < old_size:
                self.memory.forbid(old + size, old + old_size, forget=True)
            return old
        if not flags & 1:
            raise OSError(errno.ENOMEM, "mremap")
        new = self.memory.reserve(size)
        self.memory.allow(new, new + size)
        self.memory.write(new, self.memory.read(old, old_size))
        self.memory.forbid(old, old + old_size, forget=True)
        return new

    def madvise(self, address, size, advice, *_):
        if advice == 4:  # MADV_DONTNEED: zeros again
            size = size + PAGE - 1 & -PAGE
            self.memory.check(address, size)
            self.memory.write(address, bytes(size))
        return 0

    def brk(self, address, *_):
        if self.heap_start <= address < STACK_TOP - STACK_BYTES - (1 << 30):
            end = address + PAGE - 1 & -PAGE
            if end > self.heap:
                self.memory.allow(self.heap, end)
            elif end < self.heap:
                self.memory.forbid(end, self.heap, forget=True)
            self.heap = end
            return address
        return self.heap

    # Everything else.

    def write(self, file, address, size, *_):
        if file not in (1, 2):
            raise OSError(errno.EBADF, "write")
        data = self.memory.read(address, size)
        while data:
            data = data[os.write(file, data) :]
        return size

    def writev(self, file, vectors, count, *_):
        total = 0
        for at in range(count):
            address, size = struct.unpack("<QQ", self.memory.read(vectors + 16 * at, 16))
            total += self.write(file, address, size)
        return total

    def clock(self, _clock, result, *_):
        # So a loop that waits for the clock ends.
        self.now += 1000
        self.memory.write(result, struct.pack("<qq", *divmod(self.now, 10**9)))
        return 0

    def getrandom(self, address, size, *_):
        data = bytearray()
        while len(data) < size:
            self.random = (self.random * 6364136223846793005 + 1442695040888963407) % (1 << 64)
            data += struct.pack("<I", self.random >> 32)
        self.memory.write(address, bytes(data[:size]))
        return size

    def affinity(self, _pid, size, mask, *_):
        self.memory.write(mask, struct.pack("<Q", 1))
        return 8

    def set_fs(self, code, address, *_):
        if code != 0x1002:
            raise OSError(errno.EINVAL, "arch_prctl")
        self.current.fs = address
        self.emulator.set_fs(address)
        return 0

    def set_tid_address(self, address, *_):
        self.current.clear_tid = address
        return self.current.tid

    def limits(self, _pid, which, _new, old, *_):
        if old:
            soft = STACK_BYTES if which == 3 else 1024 if which == 7 else (1 << 64) - 1
            self.memory.write(old, struct.pack("<QQ", soft, soft))
        return 0

    def poll(self, fds, count, *_):
        for at in range(count):
            self.memory.write(fds + 8 * at + 6, bytes(2))
        return 0

    def uname(self, buffer, *_):
        fields = (b"Linux", b"emulated", b"6.1.0", b"#1", b"x86_64", b"")
        self.memory.write(buffer, b"".join(field.ljust(65, b"\0") for field in fields))
        return 0


class Exit:
    def __init__(self, status):
        self.status = status & 0xFF


def fails(number):
    def call(*_):
        raise OSError(number, "")

    return call


def gives(value):
    return lambda *_: value


CALLS = {
    0: gives(0),  # read: standard input is empty
    1: Kernel.write,
    3: gives(0),  # close
    7: Kernel.poll,
    9: Kernel.mmap,
    10: Kernel.mprotect,
    11: Kernel.munmap,
    12: Kernel.brk,
    13: gives(0),  # rt_sigaction: no signal comes
    14: gives(0),  # rt_sigprocmask
    16: fails(errno.ENOTTY),  # ioctl
    20: Kernel.writev,
    21: fails(errno.ENOENT),  # access
    24: Kernel.give_way,
    25: Kernel.mremap,
    28: Kernel.madvise,
    35: lambda kernel, request, *_: kernel.sleep(0, 0, request),
    39: gives(1),  # getpid
    56: Kernel.clone,
    60: Kernel.exit_thread,
    63: Kernel.uname,
    72: gives(0),  # fcntl
    79: fails(errno.ENOENT),  # getcwd
    89: fails(errno.ENOENT),  # readlink
    131: gives(0),  # sigaltstack
    157: gives(0),  # prctl
    158: Kernel.set_fs,
    186: lambda kernel, *_: kernel.current.tid,
    202: Kernel.futex,
    203: gives(0),  # sched_setaffinity
    204: Kernel.affinity,
    218: Kernel.set_tid_address,
    228: Kernel.clock,
    230: Kernel.sleep,
    231: lambda _kernel, status, *_: Exit(status),
    234: lambda *_: Exit(134),  # tgkill: abort
    257: fails(errno.ENOENT),  # openat
    262: fails(errno.ENOENT),  # newfstatat
    267: fails(errno.ENOENT),  # readlinkat
    273: gives(0),  # set_robust_list
    302: Kernel.limits,
    318: Kernel.getrandom,
    332: fails(errno.ENOENT),  # statx
    334: fails(errno.ENOSYS),  # rseq
    435: fails(errno.ENOSYS),  # clone3: glibc falls back to clone
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emulator", required=True, help="the extension module of bochscpu-python")
    parser.add_argument("--cpu", choices=sorted(CPUS), default="sapphire_rapids")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the program")
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    try:
        emulator = Emulator(options.emulator, options.cpu)
        kernel = Kernel(emulator, options.cpu, options.program, options.arguments, options.env)
        status = kernel.run()
    except Failure as failure:
        status, message = failure.args
        print(f"emulate.py: {message}", file=sys.stderr)
    sys.stdout.flush()
    # The emulator's destructors are of no use, and not all of them are sound.
    os._exit(status)


if __name__ == "__main__":
    main()
