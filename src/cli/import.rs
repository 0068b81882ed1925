//! `cowslip import`: converts an image with changes into an overlay over its backing file.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use super::cleanup::Interruptible;
use super::client::check_answers;
use super::mount::current_dir;
use super::plan::TrustArgs;
use super::{EXIT_OK, print_line};
use crate::config::{Format, format_size, format_zeroed};
use crate::offline::import::{Import, Imported};

#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// A qcow2 image
    image: PathBuf,
    /// Where to make the overlay
    #[arg(long, value_name = "DIR")]
    overlay: PathBuf,
    /// Let the image have its backing files below DIR, besides its own directory
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
}

pub(super) fn run(args: &ImportArgs) -> anyhow::Result<u8> {
    let here = current_dir()?;
    check_answers(&args.image)?;
    check_answers(&args.overlay)?;
    args.trust.allow(&here)?;
    let allow_backing = args.allow_backing.iter().map(|below| here.join(below)).collect();
    let image = here.join(&args.image);
    let import = Import::prepare(&image, &here.join(&args.overlay), allow_backing)?;
    let shown = args.overlay.display();
    let work = Interruptible::begin(import.part().to_owned())
        .with_context(|| format!("overlay '{shown}'"))?;
    let imported = import.run(&|| work.is_interrupted(), &|| work.begin_naming());
    work.end();
    let Imported { base, size, changes } = imported?;
    let mount = match base {
        Some((path, Format::Raw)) => format!("NAME={},overlay={shown}", path.display()),
        Some((path, format)) => format!("NAME={},format={format},overlay={shown}", path.display()),
        None => format!("NAME=blank:{size},overlay={shown}"),
    };
    let (data, zeroed) = (format_size(changes.data), format_zeroed(changes.zero));
    print_line(&format!("{shown}: holds {data} of changes{zeroed}: mount it as {mount}"));
    Ok(EXIT_OK)
}
