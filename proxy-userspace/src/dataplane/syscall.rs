//! The system calls that no library offers: batches of map entries, and links of every kind pinned, found again and
//! given another program. The only unsafe code of the dataplane; everything it exports is safe.
//!
//! The structures are the parts of `union bpf_attr` (include/uapi/linux/bpf.h) that each command reads. The kernel takes
//! a shorter union than its own and reads the rest as zero.

pub(super) mod bytes;

use std::{
    ffi::CString,
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::{
    Pod,
    maps::{MapData, RingBuf},
};
use tokio::io::unix::AsyncFd;

const MAP_LOOKUP_ELEM: u32 = 1;
const MAP_UPDATE_ELEM: u32 = 2;
const MAP_DELETE_ELEM: u32 = 3;
const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const MAP_LOOKUP_BATCH: u32 = 24;
const MAP_UPDATE_BATCH: u32 = 26;
const MAP_DELETE_BATCH: u32 = 27;
const LINK_CREATE: u32 = 28;
const LINK_UPDATE: u32 = 29;
const LINK_DETACH: u32 = 34;

/// Room for the kernel's place in a dump: its cursor is at most as long as a key.
const CURSOR: usize = 64;

/// Has glibc's allocator give back what is free, and not keep it for a thread each. A list of objects, the kernel's types and
/// the first plan take many times the memory that stays in use, once. Other allocators have their own ways.
pub(super) fn keep_little_free_memory() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in
        [(libc::M_ARENA_MAX, 2), (libc::M_MMAP_THRESHOLD, 64 * 1024), (libc::M_TRIM_THRESHOLD, 128 * 1024)]
    {
        // SAFETY: it takes two numbers, and refuses those it does not know.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Has the runtime say when there are records.
pub(super) fn wait_on(records: RingBuf<MapData>) -> io::Result<AsyncFd<RingBuf<MapData>>> {
    // SAFETY: its descriptor is that of its map, which it owns, and the same for as long as it lives.
    Ok(unsafe { AsyncFd::register(records) }?)
}

/// Makes a bpf(2) call.
///
/// # Safety
///
/// `attributes` must be laid out as the kernel reads it for this command, and every pointer in it must be valid for
/// what the command reads and writes there.
unsafe fn bpf<T>(command: u32, attributes: &mut T) -> io::Result<RawFd> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of `attributes`, which is as long; the caller vouches for the rest.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

/// A file descriptor that a bpf(2) call has just returned.
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has made the descriptor for this call; nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[repr(C)]
struct ElementAttributes {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl ElementAttributes {
    fn new<K: ?Sized>(map: BorrowedFd<'_>, key: &K) -> Self {
        Self { map: map.as_raw_fd().cast_unsigned(), pad: 0, key: address(key), value: 0, flags: 0 }
    }
}

fn address<T: ?Sized>(value: &T) -> u64 {
    std::ptr::from_ref(value).cast::<u8>() as u64
}

/// Reads an entry.
///
/// `K` and `V` must have the sizes of the map's keys and values: see [`super::table::Table`].
pub(super) fn lookup<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<V> {
    let mut value = MaybeUninit::<V>::uninit();
    let mut attributes = ElementAttributes::new(map, key);
    attributes.value = value.as_mut_ptr() as u64;
    // SAFETY: the kernel reads a key and writes a value, of the sizes the caller has checked.
    unsafe { bpf(MAP_LOOKUP_ELEM, &mut attributes) }?;
    // SAFETY: the kernel has written all of it, and any bytes are a value of a `Pod`.
    Ok(unsafe { value.assume_init() })
}

/// Writes an entry.
///
/// `K` and `V` must have the sizes of the map's keys and values.
pub(super) fn update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attributes = ElementAttributes::new(map, key);
    attributes.value = address(value);
    // SAFETY: the kernel reads a key and a value, of the sizes the caller has checked.
    unsafe { bpf(MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
}

/// Removes an entry.
///
/// `K` must have the size of the map's keys.
pub(super) fn delete<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<()> {
    let mut attributes = ElementAttributes::new(map, key);
    // SAFETY: the kernel reads a key, of the size the caller has checked.
    unsafe { bpf(MAP_DELETE_ELEM, &mut attributes) }.map(drop)
}

#[repr(C)]
struct BatchAttributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    elem_flags: u64,
    flags: u64,
}

impl BatchAttributes {
    fn new<K>(map: BorrowedFd<'_>, keys: &[K]) -> Self {
        Self {
            in_batch: 0,
            out_batch: 0,
            keys: address(keys),
            values: 0,
            count: keys.len() as u32,
            map: map.as_raw_fd().cast_unsigned(),
            elem_flags: 0,
            flags: 0,
        }
    }
}

/// How far a batch came: `Err` has the number of entries that were done before the one that failed.
pub(super) type BatchResult = Result<(), (usize, io::Error)>;

fn batch(command: u32, attributes: &mut BatchAttributes) -> BatchResult {
    let asked = attributes.count as usize;
    // SAFETY: both callers point it at as many keys and values as `count` says, of the sizes their callers have checked.
    match unsafe { bpf(command, attributes) } {
        Ok(_) => Ok(()),
        // A kernel that does not know the command leaves `count` as it was.
        Err(error) if attributes.count as usize >= asked => Err((0, error)),
        Err(error) => Err((attributes.count as usize, error)),
    }
}

/// Writes entries in order.
///
/// `K` and `V` must have the sizes of the map's keys and values.
pub(super) fn update_batch<K: Pod, V: Pod>(map: BorrowedFd<'_>, keys: &[K], values: &[V]) -> BatchResult {
    assert_eq!(keys.len(), values.len(), "a value for each key");
    let mut attributes = BatchAttributes::new(map, keys);
    attributes.values = address(values);
    batch(MAP_UPDATE_BATCH, &mut attributes)
}

/// Removes entries in order.
///
/// `K` must have the size of the map's keys.
pub(super) fn delete_batch<K: Pod>(map: BorrowedFd<'_>, keys: &[K]) -> BatchResult {
    batch(MAP_DELETE_BATCH, &mut BatchAttributes::new(map, keys))
}

/// Reads every entry, in the kernel's order, `chunk` at a time, until `each` returns false.
///
/// `K` and `V` must have the sizes of the map's keys and values.
pub(super) fn dump<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    mut chunk: usize,
    mut each: impl FnMut(K, V) -> bool,
) -> io::Result<()> {
    let mut cursor = [0_u8; CURSOR];
    let mut started = false;
    loop {
        let mut keys = Vec::<K>::with_capacity(chunk);
        let mut values = Vec::<V>::with_capacity(chunk);
        let mut next = [0_u8; CURSOR];
        let mut attributes = BatchAttributes {
            in_batch: if started { address(&cursor) } else { 0 },
            out_batch: next.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: chunk as u32,
            map: map.as_raw_fd().cast_unsigned(),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: there is room for `count` keys and values, of the sizes the caller has checked, and for a cursor.
        let result = unsafe { bpf(MAP_LOOKUP_BATCH, &mut attributes) };
        let is_last = match result {
            Ok(_) => false,
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => true,
                // One bucket of a hash table has more entries than there is room for.
                Some(libc::ENOSPC) => {
                    chunk *= 2;
                    continue;
                }
                _ => return Err(error),
            },
        };
        let count = (attributes.count as usize).min(chunk);
        // SAFETY: the kernel has written `count` keys; any bytes are a value of a `Pod`.
        unsafe { keys.set_len(count) };
        // SAFETY: and as many values.
        unsafe { values.set_len(count) };
        if !keys.into_iter().zip(values).all(|(key, value)| each(key, value)) || is_last {
            return Ok(());
        }
        cursor = next;
        started = true;
    }
}

#[repr(C)]
struct ObjectAttributes {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// Opens a pinned object.
pub(super) fn object(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attributes = ObjectAttributes { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the path is a C string that lives until the call returns.
    unsafe { bpf(OBJ_GET, &mut attributes) }.map(owned)
}

/// Pins an object.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attributes =
        ObjectAttributes { path: path.as_ptr() as u64, fd: object.as_raw_fd().cast_unsigned(), flags: 0 };
    // SAFETY: the path is a C string that lives until the call returns.
    unsafe { bpf(OBJ_PIN, &mut attributes) }.map(drop)
}

/// What a program is attached to.
#[derive(Clone, Copy, Debug)]
pub(super) enum LinkTarget<'a> {
    /// A device of the calling thread's network namespace, by interface index.
    Device(u32),
    /// A cgroup's directory.
    Cgroup(BorrowedFd<'a>),
}

#[repr(C)]
struct LinkCreateAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    pad: u32,
    expected_revision: u64,
}

/// Attaches a program; it stays attached as long as the returned descriptor, or a pin of it, exists.
pub(super) fn create_link(
    program: BorrowedFd<'_>,
    target: LinkTarget<'_>,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attributes = LinkCreateAttributes {
        program: program.as_raw_fd().cast_unsigned(),
        target: match target {
            LinkTarget::Device(ifindex) => ifindex,
            LinkTarget::Cgroup(directory) => directory.as_raw_fd().cast_unsigned(),
        },
        attach_type,
        flags,
        relative: 0,
        pad: 0,
        expected_revision: 0,
    };
    // SAFETY: no pointers.
    unsafe { bpf(LINK_CREATE, &mut attributes) }.map(owned)
}

#[repr(C)]
struct LinkUpdateAttributes {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// Puts another program in the place of a link's, atomically.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = LinkUpdateAttributes {
        link: link.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        flags: 0,
        old_program: 0,
    };
    // SAFETY: no pointers.
    unsafe { bpf(LINK_UPDATE, &mut attributes) }.map(drop)
}

#[repr(C)]
struct LinkDetachAttributes {
    link: u32,
}

/// Takes a link's program from where it is attached, now, whoever else refers to the link.
pub(super) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = LinkDetachAttributes { link: link.as_raw_fd().cast_unsigned() };
    // SAFETY: no pointers.
    unsafe { bpf(LINK_DETACH, &mut attributes) }.map(drop)
}

/// The head of `struct bpf_link_info`, long enough for what the kinds of link used here say.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LinkInfo {
    /// `enum bpf_link_type`.
    pub(super) kind: u32,
    /// The link's own id.
    pub(super) id: u32,
    /// Id of its program.
    pub(super) program: u32,
    pad: u32,
    details: [u32; 4],
}

impl LinkInfo {
    /// `BPF_LINK_TYPE_CGROUP`
    const CGROUP: u32 = 3;

    /// How its program is attached, by `enum bpf_link_type`.
    pub(super) fn mechanism(&self) -> String {
        match self.kind {
            Self::CGROUP => "cgroup".into(),
            6 => "xdp".into(),
            11 => "tcx".into(),
            other => format!("kind {other}"),
        }
    }

    /// The interface index of the device, 0 when that is gone; the id of the cgroup.
    pub(super) fn target(&self) -> u64 {
        let [low, high, ..] = self.details;
        if self.kind == Self::CGROUP { u64::from(high) << 32 | u64::from(low) } else { u64::from(low) }
    }
}

#[repr(C)]
struct InfoAttributes {
    fd: u32,
    length: u32,
    info: u64,
}

/// What the kernel says of a link.
pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::default();
    let mut attributes = InfoAttributes {
        fd: link.as_raw_fd().cast_unsigned(),
        length: size_of::<LinkInfo>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: the kernel writes at most `length` bytes to `info`.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    Ok(info)
}

/// The cookie of the calling thread's network namespace, as the programs see it.
pub(super) fn network_namespace_cookie() -> io::Result<u64> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}
