//! The flags, as the parser of the command line has them.

use std::fmt::Write as _;

use clap::{Arg, Command, CommandFactory as _};

use super::{assert_is_current, cell};
use crate::cli::Cli;

const HEAD: &str = "# Flags\n\n\
    <!-- Made from the code by `cargo xtask docs`. -->\n\n\
    A flag decides before the file of `--config`, the file before the default. Names are those of kube-proxy where the meaning is \
    the same. What several of them mean together stands in [Configuration](../configuration.md).\n";

fn flag(argument: &Arg) -> String {
    let mut names = vec![];
    names.extend(argument.get_short().map(|short| format!("-{short}")));
    names.extend(argument.get_long().map(|long| format!("--{long}")));
    names.extend(argument.get_visible_aliases().into_iter().flatten().map(|alias| format!("--{alias}")));
    let value = argument.get_value_names().filter(|_| argument.get_action().takes_values());
    let value = value.and_then(|names| names.first()).map(|name| format!(" {name}")).unwrap_or_default();
    names.iter().map(|name| format!("`{name}{value}`")).collect::<Vec<_>>().join(", ")
}

fn meaning(argument: &Arg) -> String {
    let mut text = cell(&argument.get_help().map(ToString::to_string).unwrap_or_default());
    let values = argument.get_possible_values();
    let values = values.iter().filter_map(|value| Some((value.get_name(), value.get_help()?.to_string())));
    for (name, help) in values {
        let _ = write!(text, "<br>`{name}`: {}", cell(&help));
    }
    text
}

fn default(argument: &Arg) -> String {
    let defaults = argument.get_default_values().iter().filter(|_| argument.get_action().takes_values());
    let mut defaults: Vec<String> = defaults.map(|value| format!("`{}`", value.to_string_lossy())).collect();
    defaults.extend(argument.get_env().map(|name| format!("the variable `{}`", name.to_string_lossy())));
    defaults.join(", ")
}

/// A command that does something, and its name: those that only hold others have no section.
fn commands(command: &Command, name: &str) -> Vec<(String, Command)> {
    let inner = command.get_subcommands().filter(|inner| inner.get_name() != "help");
    let inner: Vec<_> = inner.flat_map(|inner| commands(inner, &format!("{name} {}", inner.get_name()))).collect();
    if inner.is_empty() { vec![(name.to_owned(), command.clone())] } else { inner }
}

fn section((name, command): &(String, Command)) -> String {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let mut text = format!("\n## `{name}`\n\n{about}\n\n| flag | default | what |\n|---|---|---|\n");
    let shown = |argument: &&Arg| !argument.is_hide_set() && argument.get_id() != "help";
    for argument in command.get_arguments().filter(shown) {
        let name = if argument.is_positional() { format!("`{argument}`") } else { flag(argument) };
        let _ = writeln!(text, "| {name} | {} | {} |", default(argument), meaning(argument));
    }
    text
}

/// Every flag there is, as `--name`.
pub(super) fn all() -> Vec<String> {
    let commands = commands(&Cli::command(), "sluice");
    let arguments = commands.iter().flat_map(|(_, command)| command.get_arguments());
    let longs = arguments.flat_map(|argument| argument.get_long_and_visible_aliases().unwrap_or_default());
    longs.chain(["help", "version"]).map(|long| format!("--{long}")).collect()
}

#[test]
fn the_page_of_flags_is_what_the_command_line_knows() {
    let mut command = Cli::command();
    command.build();
    let sections: String = commands(&command, "sluice").iter().map(section).collect();
    assert_is_current("reference/flags.md", &(HEAD.to_owned() + &sections));
}
