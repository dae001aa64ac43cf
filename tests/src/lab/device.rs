//! What `ip` cannot do to a device: offload switches, and a native XDP program that passes everything.
//!
//! A veth drops frames sent by `XDP_TX` or a redirect unless the device at its other end has a native XDP program
//! itself, and a program that rewrites packets on XDP may trust their checksums only if the sender fills them in.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use anyhow::{Context as _, Result};

use crate::netns::Namespace;

const SIOCETHTOOL: libc::Ioctl = 0x8946;

/// Switches of `linux/ethtool.h`.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum Offload {
    /// `ETHTOOL_STXCSUM`: leave the checksums of sent packets to the device. Segmentation offload hangs on it.
    TransmitChecksum = 0x17,
    /// `ETHTOOL_SFLAGS`, all off: among others, leave VLAN tags to the device.
    VlanTags = 0x26,
    /// `ETHTOOL_SGRO`: join received segments.
    ReceiveJoin = 0x2c,
}

#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// Turns an offload of a device on or off.
pub fn set_offload(namespace: &Namespace, device: &str, offload: Offload, on: bool) -> Result<()> {
    namespace
        .run(|| ethtool(device, EthtoolValue { command: offload as u32, data: u32::from(on) }))?
        .with_context(|| format!("cannot set {offload:?} of {device} in {}", namespace.name()))
}

fn ethtool(device: &str, mut value: EthtoolValue) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    // SAFETY: an ifreq is plain memory, for which all zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the kernel reads the request and the value behind its pointer; both outlive the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A native XDP program that passes every frame; it leaves with the handle.
#[derive(Debug)]
pub struct XdpPass {
    _link: OwnedFd,
}

impl XdpPass {
    /// Attaches it to a device, which must not have an XDP program yet.
    pub fn attach(namespace: &Namespace, device: &str) -> Result<Self> {
        let index = namespace.device_index(device)?;
        let link = namespace
            .run(|| link_create(&load_pass()?, index))?
            .with_context(|| format!("cannot attach XDP to {device} in {}", namespace.name()))?;
        Ok(Self { _link: link })
    }
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
/// Frames larger than a page may come in parts.
const BPF_F_XDP_HAS_FRAGS: u32 = 1 << 5;
const XDP_PASS: u64 = 2;

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`; the rest counts as zero.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: *const u64,
    license: *const libc::c_char,
    log: [u32; 4],
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The beginning of `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    prog_fd: RawFd,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

fn load_pass() -> io::Result<OwnedFd> {
    // BPF_ALU64 | BPF_MOV | BPF_K into r0, then BPF_JMP | BPF_EXIT.
    let instructions: [u64; 2] = [0xb7 | XDP_PASS << 32, 0x95];
    let attributes = ProgLoad {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: instructions.len() as u32,
        insns: instructions.as_ptr(),
        license: c"GPL".as_ptr(),
        log: [0; 4],
        kern_version: 0,
        prog_flags: BPF_F_XDP_HAS_FRAGS,
        prog_name: *b"lab_pass\0\0\0\0\0\0\0\0",
        prog_ifindex: 0,
        expected_attach_type: BPF_XDP,
    };
    bpf(BPF_PROG_LOAD, &attributes)
}

fn link_create(program: &OwnedFd, target_ifindex: u32) -> io::Result<OwnedFd> {
    let flags = XDP_FLAGS_DRV_MODE;
    bpf(BPF_LINK_CREATE, &LinkCreate { prog_fd: program.as_raw_fd(), target_ifindex, attach_type: BPF_XDP, flags })
}

/// A bpf(2) command whose answer is a descriptor.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes and what their pointers lead to, all of which outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    let descriptor = RawFd::try_from(result).map_err(io::Error::other)?;
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made the descriptor, with close-on-exec, and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
