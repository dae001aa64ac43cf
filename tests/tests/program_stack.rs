//! How deep the programs' stacks become, as the oldest kernel counts: each function's is rounded up to 32 bytes, and those
//! of a chain of calls have 512 together (`check_max_stack_depth` of `kernel/bpf/verifier.c`; newer ones round to 16
//! where the JIT allows it). What loads here may be refused there, so that this is counted without a kernel.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use anyhow::{Context as _, Result};
use aya_obj::{Object, generated::bpf_insn};
use proxy_userspace::dataplane::OBJECT;

const STACK: usize = 512;
const GRAIN: usize = 32;

/// The frame pointer.
const R10: u8 = 10;
const CALL: u8 = 0x85;
const LOAD_ADDRESS: u8 = 0x18;
const MOVE: u8 = 0xbf;
const ADD: u8 = 0x07;
/// Of the source register: a call of a function of the program, and the address of one.
const PSEUDO_CALL: u8 = 1;
const PSEUDO_FUNC: u8 = 4;

/// A function of a linked program.
#[derive(Default)]
struct Frame {
    depth: usize,
    /// Where the functions begin that it calls.
    calls: BTreeSet<usize>,
}

/// Where an instruction calls to, or what function it takes the address of.
fn callee(index: usize, insn: bpf_insn) -> Option<usize> {
    let is_call = insn.code == CALL && insn.src_reg() == PSEUDO_CALL;
    let is_callback = insn.code == LOAD_ADDRESS && insn.src_reg() == PSEUDO_FUNC;
    (is_call || is_callback).then(|| index.checked_add_signed(insn.imm as isize + 1)).flatten()
}

/// How far below the frame pointer an instruction reaches. Addresses are made by a copy and a sum.
fn reach(insn: bpf_insn, copies: &mut HashSet<u8>) -> usize {
    // Loads, and stores of numbers and registers.
    let base = match insn.code & 7 {
        1 => insn.src_reg(),
        2 | 3 => insn.dst_reg(),
        _ => 0,
    };
    let offset = if base == R10 { i32::from(insn.off) } else { 0 };
    let sum = if insn.code == ADD && copies.contains(&insn.dst_reg()) { insn.imm } else { 0 };
    if insn.code == MOVE && insn.src_reg() == R10 {
        copies.insert(insn.dst_reg());
    } else {
        copies.remove(&insn.dst_reg());
    }
    offset.min(sum).min(0).unsigned_abs() as usize
}

/// The functions of a linked program, by where they begin.
fn frames(instructions: &[bpf_insn]) -> BTreeMap<usize, Frame> {
    let mut frames = BTreeMap::from([(0, Frame::default())]);
    for (index, insn) in instructions.iter().enumerate() {
        if let Some(callee) = callee(index, *insn) {
            frames.entry(callee).or_default();
        }
    }
    let mut copies = HashSet::new();
    for (index, insn) in instructions.iter().enumerate() {
        if let Some((_, frame)) = frames.range_mut(..=index).next_back() {
            frame.calls.extend(callee(index, *insn));
            frame.depth = frame.depth.max(reach(*insn, &mut copies));
        }
    }
    frames
}

/// The deepest chain that begins with a function: how deep it is, and its functions.
fn deepest(frames: &BTreeMap<usize, Frame>, start: usize) -> (usize, Vec<usize>) {
    let frame = &frames[&start];
    let (below, chain) = frame.calls.iter().map(|call| deepest(frames, *call)).max().unwrap_or_default();
    (frame.depth.max(1).next_multiple_of(GRAIN) + below, [vec![start], chain].concat())
}

#[test]
fn every_chain_of_calls_fits_the_stack() -> Result<()> {
    let mut object = Object::parse(OBJECT)?;
    let names: BTreeMap<u32, String> = object
        .functions
        .values()
        .filter_map(|function| Some((function.func_info.func_info.first()?.type_id, function.name.clone())))
        .collect();
    let text = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_calls(&text)?;
    let mut too_deep = Vec::new();
    for (name, program) in &object.programs {
        let function = object.functions.get(&program.function_key()).context("a program without code")?;
        let frames = frames(&function.instructions);
        let (depth, chain) = deepest(&frames, 0);
        println!("{name:14} {depth:>4} bytes of stack");
        let name_of = |start: &usize| {
            let info = function.func_info.func_info.iter().find(|info| info.insn_off as usize == *start);
            let name = info.and_then(|info| names.get(&info.type_id)).map_or("?", |name| name);
            format!("\n  {:>4} {name}", frames[start].depth)
        };
        if depth > STACK {
            too_deep.push(format!("{name}: {depth}{}", chain.iter().map(name_of).collect::<String>()));
        }
    }
    assert!(too_deep.is_empty(), "{}", too_deep.join("\n"));
    Ok(())
}
