//! Taking over from a version whose maps have another layout, older or newer, under traffic.
//!
//! New maps are filled beside the old ones and new programs loaded over them. Programs of both versions must not open flows in different
//! tables at the same time: a request that went through one version's and a reply that goes through the other's would leave
//! untranslated. So for an instant nobody opens flows ([`newcomers::HOLD`] in both versions' `NODE`): what has changed since the first
//! copy is copied, every link gets its new program, and what old programs have still written is added. Flows that are known go on all
//! the time, a client whose first packet is dropped sends it again.
//!
//! The two directories of maps then change places, which is one system call: that is the moment at which the new ones count. Until then
//! the old ones have every flow, because nobody opens others. So whoever is stopped in the middle leaves a second directory and nothing
//! else to be regarded: the next start, of either version, takes what stands in the usual one, gives every link its own programs and
//! lets flows be opened again.

mod copy;
mod swap;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aya::Ebpf;
use proxy_common::node::newcomers;
use rustix::fs::{CWD, RenameFlags};
use tracing::{info, warn};

use self::{copy::Copies, swap::Swap};
use super::{
    error::OpenError,
    layout::{self, Footing, Layout},
    load::{self, maps_directory},
    options::Options,
    raw::RawMap,
    syscall,
};

/// How long programs run at most, where the kernel does not tell when they have ended.
const PROGRAMS_END: Duration = Duration::from_millis(100);

/// Directory of the maps that are made, or were left, while those of the usual one are taken over. A BPF file system takes no dots in
/// names.
pub(super) fn second_directory(pin_path: &Path) -> PathBuf {
    pin_path.join("maps-second")
}

/// Loads maps and programs, which are attached nowhere yet unless they have taken over from those of another layout.
pub(super) fn open(options: &Options) -> Result<Ebpf, OpenError> {
    let own = Layout::own()?;
    let directory = maps_directory(&options.pin_path);
    // Before anything is changed.
    let footing = layout::footing(&directory, &own)?;
    let second = second_directory(&options.pin_path);
    let is_unfinished = second.exists();
    match footing {
        Footing::Other(theirs) => {
            if is_unfinished {
                warn!("a take-over was interrupted; it begins anew");
                empty(&second)?;
            }
            Migration { options, directory, second, is_unfinished, theirs: &theirs, own: &own }.run()
        }
        Footing::Own => {
            let mut object = load::load(options, &directory)?;
            if Layout::pinned(&directory)?.is_none() {
                own.write(&directory)?;
            }
            if is_unfinished {
                warn!("a take-over was interrupted; what there was before it goes on");
                Swap::prepare(options, &mut object, &own)?.run(&mut object);
                set_hold(&directory, &own, false)?;
                remove(&second)?;
            }
            Ok(object)
        }
    }
}

struct Migration<'a> {
    options: &'a Options,
    directory: PathBuf,
    second: PathBuf,
    /// Links may have programs of either version.
    is_unfinished: bool,
    theirs: &'a Layout,
    own: &'a Layout,
}

impl Migration<'_> {
    fn run(&self) -> Result<Ebpf, OpenError> {
        let began = Instant::now();
        fs::create_dir_all(&self.second).map_err(|source| self.path_error(source))?;
        let made = self.prepare();
        let (mut object, mut copies, swap) = match made {
            Ok(made) => made,
            Err(error) => return Err(self.give_up(error)),
        };
        let held = Instant::now();
        let caught_up = self.hold().and_then(|()| Ok(copies.catch_up()?));
        if let Err(error) = caught_up {
            return Err(self.give_up(error));
        }
        let links = swap.run(&mut object);
        // Little is lost without it: all that was known when nobody opened flows any more is there.
        let late = copies.add_missing().unwrap_or_else(|error| {
            warn!("flows of the last instant are not taken over: {error}");
            0
        });
        exchange(&self.directory, &self.second).map_err(|source| self.path_error(source))?;
        set_hold(&self.directory, self.own, false)?;
        let held = held.elapsed();
        remove(&self.second)?;
        let (from, to) = (self.theirs.number, self.own.number);
        info!(from, to, entries = copies.written(), late, links, ?held, took = ?began.elapsed(), "took over the maps of another layout");
        Ok(object)
    }

    /// All that takes long.
    fn prepare(&self) -> Result<(Ebpf, Copies, Swap), OpenError> {
        let mut object = load::load_beside(self.options, &self.directory, &self.second)?;
        self.own.write(&self.second)?;
        let swap = Swap::prepare(self.options, &mut object, self.theirs)?;
        let mut copies = Copies::open(&self.directory, self.theirs, &self.second, self.own)?;
        copies.begin()?;
        Ok((object, copies, swap))
    }

    /// No program opens a flow once this returns, neither of the old ones nor of the new ones.
    fn hold(&self) -> Result<(), OpenError> {
        set_hold(&self.second, self.own, true)?;
        set_hold(&self.directory, self.theirs, true)?;
        if let Err(error) = syscall::bytes::wait_for_programs() {
            warn!("the kernel does not say when programs have ended ({error}): waiting {PROGRAMS_END:?}");
            std::thread::sleep(PROGRAMS_END);
        }
        Ok(())
    }

    /// Leaves everything as it was.
    fn give_up(&self, error: OpenError) -> OpenError {
        if self.is_unfinished {
            return error;
        }
        let undone = set_hold(&self.directory, self.theirs, false).and_then(|()| remove(&self.second));
        if let Err(undone) = undone {
            warn!("{undone}");
        }
        error
    }

    fn path_error(&self, source: io::Error) -> OpenError {
        OpenError::PinPath { path: self.second.clone(), source }
    }
}

/// Has the programs over the maps in a directory open flows, or not.
fn set_hold(directory: &Path, layout: &Layout, is_held: bool) -> Result<(), OpenError> {
    let path = directory.join("NODE");
    let map = RawMap::open(&path, "NODE")?;
    let mut node = map.read(&0_u32.to_ne_bytes())?;
    let fields = layout.maps.get("NODE").map(|fields| &fields.value);
    let place = |name| fields?.get(name).map(|field| field.offset..field.offset + 4);
    let (Some(flags), Some(number)) = (place("flags"), place("layout")) else {
        return Err(OpenError::IncompatiblePin { path, difference: "it has no flags".into() });
    };
    let mut bits = [0; 4];
    bits.copy_from_slice(&node[flags.clone()]);
    let bits = u32::from_ne_bytes(bits);
    let bits = if is_held { bits | newcomers::HOLD } else { bits & !newcomers::HOLD };
    node[flags].copy_from_slice(&bits.to_ne_bytes());
    node[number].copy_from_slice(&layout.number.to_ne_bytes());
    Ok(map.put(&0_u32.to_ne_bytes(), &node)?)
}

/// Has two directories change places.
fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    Ok(rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
}

/// Removes the pins in a directory. Their maps go with the last program that uses them.
fn empty(directory: &Path) -> Result<(), OpenError> {
    let error = |source| OpenError::PinPath { path: directory.into(), source };
    for entry in fs::read_dir(directory).map_err(error)? {
        fs::remove_file(entry.map_err(error)?.path()).map_err(error)?;
    }
    Ok(())
}

fn remove(directory: &Path) -> Result<(), OpenError> {
    empty(directory)?;
    fs::remove_dir(directory).map_err(|source| OpenError::PinPath { path: directory.into(), source })
}
