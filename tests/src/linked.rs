//! What stands under the names of libc's functions in the test programs.

/// `aya-ebpf` defines `memcpy` for programs, which returns nothing and goes byte by byte. Linked into a program of the host it would be
/// everybody's, and C code goes by what it returns.
#[test]
fn memory_is_copied_by_libc() {
    let (source, mut copy) = (*b"some bytes", [0; 10]);
    // SAFETY: both are as long as is said.
    let returned = unsafe { libc::memcpy(copy.as_mut_ptr().cast(), source.as_ptr().cast(), source.len()) };
    assert_eq!(returned, copy.as_mut_ptr().cast());
    assert_eq!(copy, source);
}
