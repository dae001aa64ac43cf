//! Every program loads on the running kernel, and stays as small for the verifier as it is meant to be.

use std::process::Command;

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    programs::{Program, ProgramInfo},
    util::KernelVersion,
};
use proxy_userspace::dataplane::OBJECT;

/// The most instructions the verifier may look at, per program. A program that grows past its bound is either a mistake or
/// a decision to be made here.
const BOUNDS: [(&str, u32); 21] = [
    ("uplink_xdp", 190_000),
    ("uplink_in", 200_000),
    ("uplink_out", 52_000),
    ("uplink_in_l3", 162_000),
    ("uplink_out_l3", 54_000),
    ("pod_in", 170_000),
    ("pod_out", 62_000),
    ("cross_uplink_in", 62_000),
    ("cross_pod_in", 62_000),
    ("connect4", 20_000),
    ("connect6", 30_000),
    ("sendmsg4", 20_000),
    ("sendmsg6", 20_000),
    ("recvmsg4", 200),
    ("recvmsg6", 400),
    ("getpeername4", 200),
    ("getpeername6", 400),
    ("post_bind4", 500),
    ("post_bind6", 1_000),
    ("sock_release", 1_000),
    ("jiffies", 10),
];

/// How many functions the loaded program has, itself included: those the kernel keeps when the agent set no constant.
const FUNCTIONS: [(&str, usize); 13] = [
    ("uplink_xdp", 101),
    ("uplink_in", 100),
    ("uplink_out", 38),
    ("uplink_in_l3", 92),
    ("uplink_out_l3", 35),
    ("pod_in", 95),
    ("pod_out", 40),
    ("cross_uplink_in", 44),
    ("cross_pod_in", 42),
    ("connect4", 12),
    ("connect6", 19),
    ("sendmsg4", 10),
    ("sendmsg6", 10),
];

/// The object with small maps.
fn object() -> Result<Ebpf> {
    tests::netns::require_root()?;
    let mut loader = EbpfLoader::new();
    for map in ["FLOWS_V4", "FLOWS_V6", "EMBRYOS_V4", "EMBRYOS_V6", "SLOTS"] {
        loader.map_max_entries(map, 4_096);
    }
    Ok(loader.load(OBJECT)?)
}

fn load(object: &mut Ebpf, name: &str) -> Result<ProgramInfo> {
    let program = object.program_mut(name).with_context(|| format!("no program {name}"))?;
    match program {
        Program::Xdp(program) => program.load()?,
        Program::SchedClassifier(program) => program.load()?,
        Program::CgroupSockAddr(program) => program.load()?,
        Program::CgroupSock(program) => program.load()?,
        _ => anyhow::bail!("{name} is of a kind nobody knows"),
    }
    Ok(program.info()?)
}

#[test]
fn every_program_loads_and_stays_within_its_bound() -> Result<()> {
    let mut object = object()?;
    let mut names: Vec<_> = object.programs().map(|(name, _)| name.to_owned()).collect();
    names.sort();
    let mut expected: Vec<_> = BOUNDS.iter().map(|(name, _)| (*name).to_owned()).collect();
    expected.sort();
    assert_eq!(names, expected, "a bound for every program");
    // The verifier of 6.1 looks at 308,804 instructions of `uplink_xdp` where that of 6.18 looks at 192,505.
    let factor = if KernelVersion::current()? < KernelVersion::new(6, 6, 0) { 2 } else { 1 };
    for (name, bound) in BOUNDS.map(|(name, bound)| (name, bound * factor)) {
        let info = load(&mut object, name).with_context(|| format!("cannot load {name}"))?;
        let verified = info.verified_instruction_count().context("the kernel does not tell (before 5.16)")?;
        let size = info.size_translated().unwrap_or(0) / 8;
        println!("{name:14} {verified:>7} instructions verified, {size:>6} in the program");
        assert!(verified <= bound, "{name}: {verified} instructions verified, the bound is {bound}");
    }
    Ok(())
}

/// Linux 6.1 once took the way to `admit::mask` for dead code, and removed it: the program loaded and did not masquerade.
#[test]
fn no_kernel_removes_a_function_from_a_program() -> Result<()> {
    let mut object = object()?;
    for (name, expected) in FUNCTIONS {
        let id = load(&mut object, name).with_context(|| format!("cannot load {name}"))?.id().to_string();
        let dump = Command::new("bpftool").args(["prog", "dump", "xlated", "id", &id]).output()?;
        let dump = String::from_utf8(dump.stdout)?;
        let heads: Vec<_> = dump.lines().filter(|line| !line.starts_with([' ', ';']) && line.ends_with("):")).collect();
        assert_eq!(heads.len(), expected, "functions of {name} that the kernel kept:\n{}", heads.join("\n"));
    }
    Ok(())
}
