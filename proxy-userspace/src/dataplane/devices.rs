//! What devices are called.

use rustix::net::{AddressFamily, SocketType, netdevice, socket};

/// The name of a device of this thread's network namespace, if there is one with that index.
pub fn device_name(index: u32) -> Option<String> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None).ok()?;
    netdevice::index_to_name(any, index).ok()
}
