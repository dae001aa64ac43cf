//! Archives in cpio's newc format, in which Linux takes its initramfs (Documentation/driver-api/early-userspace/
//! buffer-format.rst): a header of hexadecimal numbers, the name, the content, each padded to four bytes.

use std::{
    collections::BTreeMap,
    io::{Result, Write},
    path::{Path, PathBuf},
};

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_777;

/// Files by path. Directories above them come by themselves, and before them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Archive {
    entries: BTreeMap<PathBuf, Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    mode: u32,
    content: Vec<u8>,
}

impl Archive {
    pub(crate) fn file(&mut self, path: impl AsRef<Path>, permissions: u32, content: impl Into<Vec<u8>>) {
        self.insert(path.as_ref(), FILE | permissions, content.into());
    }

    pub(crate) fn symlink(&mut self, path: impl AsRef<Path>, target: &str) {
        self.insert(path.as_ref(), SYMLINK, target.into());
    }

    pub(crate) fn directory(&mut self, path: impl AsRef<Path>) {
        self.insert(path.as_ref(), DIRECTORY, Vec::new());
    }

    pub(crate) fn contains(&self, path: impl AsRef<Path>) -> bool {
        self.entries.contains_key(relative(path.as_ref()))
    }

    /// Writes the archive. The kernel reads several in a row as one.
    pub(crate) fn write(&self, to: &mut impl Write) -> Result<()> {
        // The order of paths puts a directory before what is in it.
        for (inode, (path, entry)) in (1..).zip(&self.entries) {
            entry.write(to, inode, &path.to_string_lossy())?;
        }
        let trailer = Entry { mode: 0, content: Vec::new() };
        trailer.write(to, 0, "TRAILER!!!")
    }

    fn insert(&mut self, path: &Path, mode: u32, content: Vec<u8>) {
        let path = relative(path);
        for parent in path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()) {
            self.entries.entry(parent.to_owned()).or_insert(Entry { mode: DIRECTORY, content: Vec::new() });
        }
        self.entries.insert(path.to_owned(), Entry { mode, content });
    }
}

impl Entry {
    fn write(&self, to: &mut impl Write, inode: u32, name: &str) -> Result<()> {
        // inode, mode, uid, gid, links, mtime, size, device, special device, length of the name, checksum (unused)
        let fields = [inode, self.mode, 0, 0, 1, 0, length(&self.content), 0, 0, 0, 0, length(name.as_bytes()) + 1, 0];
        write!(to, "070701")?;
        for field in fields {
            write!(to, "{field:08X}")?;
        }
        write!(to, "{name}\0")?;
        pad(to, 110 + name.len() + 1)?;
        to.write_all(&self.content)?;
        pad(to, self.content.len())
    }
}

/// The format knows no file of 4 GiB, and a machine of ours would not hold it.
fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

fn pad(to: &mut impl Write, written: usize) -> Result<()> {
    to.write_all(&[0; 3][..written.next_multiple_of(4) - written])
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(archive: &Archive) -> Vec<u8> {
        let mut bytes = Vec::new();
        archive.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn an_empty_archive_is_its_trailer() {
        let expected = "0707010000000000000000000000000000000000000001000000000000000000000000\
            0000000000000000000000000000000B00000000TRAILER!!!\0\0\0\0";
        assert_eq!(String::from_utf8(bytes(&Archive::default())).unwrap(), expected);
    }

    #[test]
    fn directories_come_before_what_is_in_them() {
        let mut archive = Archive::default();
        archive.file("/usr/bin/ip", 0o755, "ip");
        let text = String::from_utf8(bytes(&archive)).unwrap();
        let places = ["usr\0", "usr/bin\0", "usr/bin/ip\0"].map(|name| text.find(name).unwrap());
        assert!(places.is_sorted(), "{places:?}");
    }

    #[test]
    fn headers_and_contents_start_at_multiples_of_four() {
        for size in 0..9 {
            let mut archive = Archive::default();
            archive.file("a", 0o644, vec![b'x'; size]);
            let bytes = bytes(&archive);
            assert_eq!(bytes.len() % 4, 0, "size {size}");
            let trailer = 112 + size.next_multiple_of(4);
            assert_eq!(&bytes[trailer..trailer + 6], b"070701", "size {size}");
        }
    }

    #[test]
    fn a_directory_named_again_keeps_what_it_holds() {
        let mut archive = Archive::default();
        archive.file("run/x", 0o600, "");
        archive.directory("run");
        assert!(archive.contains("/run/x"));
    }
}
