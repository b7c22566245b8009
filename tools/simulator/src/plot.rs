//! One SVG per trace: instances paid for, and the backlog, over time.

use std::path::{Path, PathBuf};

use plotters::prelude::*;

use crate::evaluate::Comparison;
use crate::world::Ms;

/// A plot that could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw {path}: {why}")]
pub struct PlotError {
    /// The file.
    pub path: String,
    /// Why.
    pub why: String,
}

const SIZE: (u32, u32) = (1000, 640);

/// Points drawn of one curve: more are not seen.
const POINTS: usize = 3000;

const COLOURS: [RGBColor; 4] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
];

/// Draws `folder/NAME.svg`.
pub fn draw(comparison: &Comparison, folder: &Path) -> Result<PathBuf, PlotError> {
    let path = folder.join(format!("{}.svg", comparison.trace.name));
    let failed = |why: String| PlotError {
        path: path.display().to_string(),
        why,
    };
    std::fs::create_dir_all(folder).map_err(|error| failed(error.to_string()))?;
    draw_into(comparison, &path).map_err(|error| failed(error.to_string()))?;
    Ok(path)
}

fn draw_into(comparison: &Comparison, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let title = format!("{}: {}", comparison.trace.name, comparison.trace.about);
    let root = root.titled(&title, ("sans-serif", 20))?;
    let (above, below) = root.split_vertically(SIZE.1 / 2);
    let end = comparison
        .rows
        .iter()
        .filter_map(|row| row.curve.last())
        .map(|(at, _, _)| *at)
        .max()
        .unwrap_or(0);
    let unit = if end > 4 * 3_600_000 {
        3_600_000.0
    } else {
        60_000.0
    };
    let unit_name = if unit > 100_000.0 { "hours" } else { "minutes" };
    let most = comparison
        .rows
        .iter()
        .flat_map(|row| row.curve.iter().map(|(_, paid, _)| *paid))
        .max()
        .unwrap_or(1);
    let panels = [
        (above, "instances paid for", f64::from(most) + 0.5, true),
        (
            below,
            "messages not done",
            highest_backlog(comparison) as f64 * 1.05 + 0.5,
            false,
        ),
    ];
    for (area, label, top, shows_instances) in panels {
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .x_label_area_size(36)
            .y_label_area_size(70)
            .build_cartesian_2d(0.0..(end as f64 / unit).max(0.1), 0.0..top)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc(unit_name)
            .y_desc(label)
            .draw()?;
        for (index, row) in comparison.rows.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let points = steps(&row.curve, |(_, paid, backlog)| {
                if shows_instances {
                    f64::from(paid)
                } else {
                    backlog as f64
                }
            });
            chart
                .draw_series(LineSeries::new(
                    points.into_iter().map(|(at, value)| (at / unit, value)),
                    colour.stroke_width(2),
                ))?
                .label(row.model)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
    }
    root.present()?;
    Ok(())
}

fn highest_backlog(comparison: &Comparison) -> u64 {
    comparison
        .rows
        .iter()
        .flat_map(|row| row.curve.iter().map(|(_, _, backlog)| *backlog))
        .max()
        .unwrap_or(1)
}

/// A staircase through the curve, thinned.
fn steps(curve: &[(Ms, u32, u64)], value: impl Fn((Ms, u32, u64)) -> f64) -> Vec<(f64, f64)> {
    let stride = curve.len().div_ceil(POINTS).max(1);
    let mut points: Vec<(f64, f64)> = vec![(0.0, 0.0)];
    for (index, point) in curve.iter().enumerate() {
        let is_last = index + 1 == curve.len();
        if index % stride != 0 && !is_last {
            continue;
        }
        let at = point.0 as f64;
        let before = points.last().map_or(0.0, |(_, value)| *value);
        points.push((at, before));
        points.push((at, value(*point)));
    }
    points
}
