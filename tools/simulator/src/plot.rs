//! One SVG per trace: instances paid for, and the backlog, over time.

use std::path::{Path, PathBuf};

use plotters::prelude::*;

use crate::evaluate::{Comparison, Row};
use crate::tally::Moment;
use crate::world::Ms;

#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    #[error("cannot make the folder {path}: {source}")]
    Folder {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot draw {path}: {source}")]
    Draw {
        path: PathBuf,
        source: DrawingAreaErrorKind<std::io::Error>,
    },
}

const SIZE: (u32, u32) = (1000, 640);

/// The legend hides nothing above the highest value.
const ROOM_FOR_LEGEND: f64 = 1.45;

const HOUR: Ms = 3_600_000;

const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 0, 0),
    RGBColor(230, 159, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
];

/// Draws `folder/NAME.svg`.
pub fn draw(comparison: &Comparison, folder: &Path) -> Result<PathBuf, PlotError> {
    std::fs::create_dir_all(folder).map_err(|source| PlotError::Folder {
        path: folder.to_owned(),
        source,
    })?;
    let path = folder.join(format!("{}.svg", comparison.trace.name));
    match draw_into(comparison, &path) {
        Ok(()) => Ok(path),
        Err(source) => Err(PlotError::Draw { path, source }),
    }
}

fn draw_into(
    comparison: &Comparison,
    path: &Path,
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let title = format!("{}: {}", comparison.trace.name, comparison.trace.about);
    let root = root.titled(&title, ("sans-serif", 20))?;
    let (above, below) = root.split_vertically(SIZE.1 / 2);
    let curves = || comparison.rows.iter().map(|row| &row.curve);
    let end = curves()
        .filter_map(|curve| curve.last())
        .map(|last| last.at);
    let end = end.max().unwrap_or(0);
    let (unit, unit_name) = match end > 4 * HOUR {
        true => (HOUR as f64, "hours"),
        false => (60_000.0, "minutes"),
    };
    for (area, label, value) in [
        (above, "instances paid for", paid as fn(&Moment) -> f64),
        (below, "messages not done", backlog),
    ] {
        let highest = curves().flatten().map(value).fold(0.0, f64::max);
        let top = (highest * ROOM_FOR_LEGEND).max(1.0);
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
        let (width, _) = chart.plotting_area().dim_in_pixel();
        // The scaler comes last, above the others.
        for (Row { model, curve, .. }, colour) in comparison.rows.iter().zip(COLOURS).rev() {
            let points = staircase(curve, value, end, width);
            chart
                .draw_series(LineSeries::new(
                    points.into_iter().map(|(at, value)| (at / unit, value)),
                    colour.stroke_width(2),
                ))?
                .label(*model)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
    }
    root.present()?;
    Ok(())
}

fn paid(moment: &Moment) -> f64 {
    f64::from(moment.paid)
}

fn backlog(moment: &Moment) -> f64 {
    moment.backlog as f64
}

/// A staircase through the curve from 0 to `end`, thinned to columns of a
/// pixel: each shows its lowest and its highest value, so that no step is lost
/// however short it is.
fn staircase(
    curve: &[Moment],
    value: impl Fn(&Moment) -> f64,
    end: Ms,
    columns: u32,
) -> Vec<(f64, f64)> {
    let column = |moment: &Moment| moment.at * Ms::from(columns) / end.max(1);
    let mut points = vec![(0.0, 0.0)];
    let mut before = 0.0;
    for moments in curve.chunk_by(|one, next| column(one) == column(next)) {
        let at = moments[0].at as f64;
        let values = || moments.iter().map(&value);
        let lowest = values().fold(f64::INFINITY, f64::min);
        let highest = values().fold(0.0, f64::max);
        let last = values().next_back().unwrap_or(before);
        points.extend([before, lowest, highest, last].map(|value| (at, value)));
        before = last;
    }
    points.push((end as f64, before));
    points.dedup();
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One instance for a day, but for a minute without any at noon; the
    /// backlog changes every second.
    fn a_day_with_a_short_pause() -> Vec<Moment> {
        (0..24 * 3600)
            .map(|second| Moment {
                at: second * 1000,
                paid: u32::from(!(43_200..43_260).contains(&second)),
                backlog: second as u64 % 2,
            })
            .collect()
    }

    #[test]
    fn a_short_step_survives_the_thinning() {
        let points = staircase(&a_day_with_a_short_pause(), paid, 24 * HOUR, 900);
        assert!(points.len() < 1000, "{}", points.len());
        let at_zero: Vec<f64> = points
            .iter()
            .filter(|(_, paid)| *paid == 0.0)
            .map(|(at, _)| at / 1000.0)
            .collect();
        // It begins at zero, and is there again in noon's column of 96 seconds.
        assert!(at_zero[0] == 0.0 && at_zero.len() > 1, "{points:?}");
        assert!(
            at_zero[1..]
                .iter()
                .all(|at| (43_200.0 - 96.0..43_260.0).contains(at)),
            "{points:?}"
        );
    }

    #[test]
    fn a_long_curve_has_a_few_points_a_pixel_and_ends_where_it_ends() {
        let curve = a_day_with_a_short_pause();
        let points = staircase(&curve, backlog, 24 * HOUR, 900);
        assert!(points.len() <= 4 * 901 + 2, "{}", points.len());
        assert_eq!(points.last(), Some(&(24.0 * HOUR as f64, 1.0)));
        // Every column shows both values.
        assert!(
            points
                .chunks(8)
                .all(|some| some.iter().any(|(_, value)| *value == 1.0))
        );
    }
}
