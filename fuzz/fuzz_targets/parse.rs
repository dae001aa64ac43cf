//! Any bytes at all, as a frame: the parser must not read beyond them (which the sanitizer sees), and what it finds must lie
//! within them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proxy_ebpf::dissect::dissect;

fuzz_target!(|bytes: &[u8]| {
    if let Some(found) = dissect(bytes) {
        assert!(found.transport + 8 <= found.end, "{found:?} has no room for its ports");
        assert!(found.end <= bytes.len(), "{found:?} of {} bytes", bytes.len());
    }
});
