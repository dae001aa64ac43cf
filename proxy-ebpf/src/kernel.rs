//! What the datapath asks of the kernel besides maps: time, chance, and the constants the agent sets when it loads the
//! object.

use aya_ebpf::{Global, helpers::generated as helpers};

/// Which sockets are balanced: 0 none, 1 those of the node's own network namespace, 2 all.
#[unsafe(no_mangle)]
pub static SOCKET_LB: Global<u8> = Global::new(2);

/// Cookie of the node's own network namespace.
#[unsafe(no_mangle)]
pub static HOST_NETNS_COOKIE: Global<u64> = Global::new(1);

/// Whether packets and bytes are counted per Service and backend: 0 takes all of that out of the programs.
#[unsafe(no_mangle)]
pub static STATS: Global<u8> = Global::new(1);

/// The low 32 bits of jiffies. Inlined by the kernel to one load.
#[inline(always)]
pub fn jiffies() -> u32 {
    // SAFETY: takes no argument.
    (unsafe { helpers::bpf_jiffies64() }) as u32
}

/// A number of which the verifier is made to forget what it knew, so that it looks once at what comes after many ways of
/// getting it. It must be told of its bounds again before it is added to a pointer.
#[inline(always)]
pub(crate) fn forgotten(number: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    let number = {
        let forgotten: u64;
        // SAFETY: takes no argument.
        let any = unsafe { helpers::bpf_jiffies64() };
        // SAFETY: arithmetic on registers: twice the same, which leaves the number what it was.
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
    };
    number
}

/// Zero, of which the verifier does not know that it is: what is in eight bytes of a packet, without what is in them.
#[inline(always)]
pub(crate) fn unknown_zero(packet: usize) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let zero: u64;
        // SAFETY: callers have seen that the packet is as long; the same memory is read twice.
        unsafe {
            core::arch::asm!(
                "{zero} = *(u64 *)({packet} + 0)",
                "{again} = *(u64 *)({packet} + 0)",
                "{zero} ^= {again}",
                packet = in(reg) packet,
                zero = out(reg) zero,
                again = out(reg) _,
                options(pure, readonly, nostack, preserves_flags),
            );
        };
        zero
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        let _ = packet;
        0
    }
}

/// A random word.
#[inline(always)]
pub(crate) fn random() -> u32 {
    // SAFETY: takes no argument.
    unsafe { helpers::bpf_get_prandom_u32() }
}

/// Adds to a word that other CPUs add to.
#[inline(always)]
pub(crate) fn add(place: *mut u32, value: u32) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: callers pass a word of a map.
    unsafe {
        core::arch::asm!("lock *(u32 *)({place} + 0) += {value}", place = in(reg) place, value = in(reg) value);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as above.
    if let Some(place) = unsafe { place.as_mut() } {
        *place = place.wrapping_add(value);
    }
}

/// The next number of a sequence that other CPUs take numbers of, too.
#[inline(always)]
pub(crate) fn next(place: *mut u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut number = 1_u64;
        // SAFETY: callers pass a number of a map.
        unsafe {
            core::arch::asm!(
                "{number} = atomic_fetch_add((u64 *)({place} + 0), {number})",
                place = in(reg) place,
                number = inout(reg) number,
            );
        }
        number
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as above.
    unsafe { place.as_mut() }.map_or(0, |place| core::mem::replace(place, place.wrapping_add(1)))
}

/// Sets bits of a word that other CPUs set bits of.
#[inline(always)]
pub(crate) fn or(place: *mut u64, bits: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: callers pass a word of a map.
    unsafe {
        core::arch::asm!("lock *(u64 *)({place} + 0) |= {bits}", place = in(reg) place, bits = in(reg) bits);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as above.
    if let Some(place) = unsafe { place.as_mut() } {
        *place |= bits;
    }
}
