//! A tunnel between two namespaces: a device in each whose packets have no link-layer header, and a thread that carries
//! them.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::netns::Namespace;

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const PACKET: usize = 65_536;

/// Two ends and what runs between them. The devices go away with it.
#[derive(Debug)]
pub struct Tunnel {
    is_over: Arc<AtomicBool>,
    carrier: Option<JoinHandle<()>>,
}

impl Tunnel {
    /// Makes a device of this name in both namespaces and brings them up.
    pub fn between(one: &Namespace, other: &Namespace, device: &str) -> Result<Self> {
        let ends = [end(one, device)?, end(other, device)?];
        for namespace in [one, other] {
            namespace.ip(&format!("link set {device} up"))?;
        }
        let is_over = Arc::new(AtomicBool::new(false));
        let until = is_over.clone();
        let carrier = thread::spawn(move || carry(&ends, &until));
        Ok(Self { is_over, carrier: Some(carrier) })
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(carrier) = self.carrier.take() {
            // A panic in there shows in the traffic that did not arrive.
            let _ = carrier.join();
        }
    }
}

fn end(namespace: &Namespace, device: &str) -> Result<File> {
    namespace.run(|| attach(device))?.with_context(|| format!("cannot make {device} in {}", namespace.name()))
}

fn attach(device: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: an ifreq is plain memory, for which all zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the kernel reads and writes the request, which outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}

/// Carries packets until it is over; it looks ten times a second.
fn carry(ends: &[File; 2], is_over: &AtomicBool) {
    let mut packet = vec![0; PACKET];
    while !is_over.load(Ordering::Relaxed) {
        let mut waiting = [0, 1].map(|index: usize| PollFd::new(ends[index].as_fd(), PollFlags::POLLIN));
        if poll(&mut waiting, PollTimeout::from(100_u8)).is_err() {
            continue;
        }
        let ready = waiting.map(|end| end.any().unwrap_or(false));
        for (index, _) in ready.into_iter().enumerate().filter(|(_, is_ready)| *is_ready) {
            let (mut from, mut to) = (&ends[index], &ends[1 - index]);
            // What is lost here is lost as on any wire.
            let _ = from.read(&mut packet).and_then(|length| to.write(&packet[..length]));
        }
    }
}
