//! A word that several CPUs read and write. What the flow table needs of it is that no load moves before an earlier load and no
//! store before an earlier load or store, and one operation that compares and exchanges.
//!
//! On x86-64 plain loads and stores keep that order: volatile ones, so that the compiler does, too. On arm64 they would not; there
//! BPF has no load that acquires before Linux 6.15, and its fetching atomics, which have the full barrier, would make of each look-up
//! a write. So the table is for x86-64.

#[cfg(not(target_arch = "bpf"))]
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Release, SeqCst},
};

/// A word of 64 bits, shared.
pub trait Word {
    /// What it is. What is loaded or stored later is, by every other CPU's view, later.
    fn load(&self) -> u64;
    /// Makes it something else. What was loaded or stored earlier is earlier.
    fn store(&self, value: u64);
    /// Makes it `new` if it is `old`, and tells what it was. Nothing moves over it.
    fn exchange(&self, old: u64, new: u64) -> u64;

    /// A number of which the verifier is to forget how it was come by, so that it looks once at what comes after many ways: xor, twice,
    /// with one it knows nothing of.
    #[inline(always)]
    fn forget(number: u64, _any: u64) -> u64 {
        number
    }
}

/// The word of the programs.
#[cfg(target_arch = "bpf")]
#[repr(transparent)]
pub struct Shared(core::cell::UnsafeCell<u64>);

// SAFETY: it is read and written in whole words only, which is what its methods are for.
#[cfg(target_arch = "bpf")]
unsafe impl Sync for Shared {}

#[cfg(target_arch = "bpf")]
impl Word for Shared {
    #[inline(always)]
    fn load(&self) -> u64 {
        // SAFETY: an aligned word that lives as long as `self`.
        unsafe { self.0.get().read_volatile() }
    }

    #[inline(always)]
    fn store(&self, value: u64) {
        // SAFETY: as in `load`.
        unsafe { self.0.get().write_volatile(value) };
    }

    #[inline(always)]
    fn exchange(&self, old: u64, new: u64) -> u64 {
        let found;
        // SAFETY: as in `load`. The instruction has its operand and its answer in r0.
        unsafe {
            core::arch::asm!(
                "r0 = cmpxchg_64({place} + 0, r0, {new})",
                place = in(reg) self.0.get(),
                new = in(reg) new,
                inout("r0") old => found,
            );
        };
        found
    }

    #[inline(always)]
    fn forget(number: u64, any: u64) -> u64 {
        let forgotten: u64;
        // SAFETY: arithmetic on registers.
        unsafe {
            core::arch::asm!(
                "{number} ^= {any}",
                "{number} ^= {any}",
                number = inlateout(reg) number => forgotten,
                any = in(reg) any,
                options(pure, nomem, nostack, preserves_flags),
            );
        };
        forgotten
    }
}

/// The same for whoever else has the table, in this machine's own memory.
#[cfg(not(target_arch = "bpf"))]
#[repr(transparent)]
pub struct Shared(AtomicU64);

#[cfg(not(target_arch = "bpf"))]
impl Shared {
    /// A word that nobody shares yet.
    #[must_use]
    pub const fn new(value: u64) -> Self {
        Self(AtomicU64::new(value))
    }
}

#[cfg(not(target_arch = "bpf"))]
impl Word for Shared {
    #[inline]
    fn load(&self) -> u64 {
        self.0.load(Acquire)
    }

    #[inline]
    fn store(&self, value: u64) {
        self.0.store(value, Release);
    }

    #[inline]
    fn exchange(&self, old: u64, new: u64) -> u64 {
        match self.0.compare_exchange(old, new, SeqCst, SeqCst) {
            Ok(found) | Err(found) => found,
        }
    }
}
