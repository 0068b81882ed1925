//! `cowslip rebase`: records the new location of the base of an overlay that is not mounted.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use super::client::check_answers;
use super::mount::current_dir;
use super::plan::{ServerArgs, TrustArgs};
use super::{EXIT_OK, print_line};
use crate::config;
use crate::offline::rebase::{OnMismatch, Rebased, rebase};

#[derive(Debug, Args)]
pub(super) struct RebaseArgs {
    /// The directory of an overlay, or of one disk of a store (STORE/names/NAME)
    overlay: PathBuf,
    /// Where its base is now: a file, or the address of an image on a server
    #[arg(long, value_name = "SOURCE")]
    base: OsString,
    /// Also to one that is not what the base was: what the overlay holds may be nonsense there
    #[arg(long)]
    force: bool,
    /// Let an image have files that it names below DIR; those of a qcow2 image may lie beside it, too
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<PathBuf>,
    #[command(flatten)]
    servers: ServerArgs,
    #[command(flatten)]
    trust: TrustArgs,
}

pub(super) fn run(args: &RebaseArgs) -> anyhow::Result<u8> {
    check_answers(&args.overlay)?;
    args.trust.allow(&current_dir()?)?;
    args.servers.apply(&current_dir()?)?;
    let on_mismatch = if args.force { OnMismatch::Accept } else { OnMismatch::Refuse };
    let shown = args.overlay.display();
    let base = config::parse_base(&args.base, &current_dir()?)?;
    base.paths().try_for_each(|path| check_answers(path))?;
    print_line(&match rebase(&args.overlay, &base, on_mismatch, &args.allow_backing)? {
        Rebased::Unchanged { base } => {
            format!("{shown}: its base is '{base}' already")
        }
        Rebased::Moved { base, was, difference } => {
            let forced = difference.map_or_else(String::new, |difference| {
                format!("; forced, it is not the same ({difference})")
            });
            format!("{shown}: its base is now '{base}', was '{was}'{forced}")
        }
    });
    Ok(EXIT_OK)
}
