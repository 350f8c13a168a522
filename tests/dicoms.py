"""A DICOM slide: a folder with one file per level."""

from pathlib import Path

import cv2
import numpy as np
from jpegs import SIDE
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage

PREFIX = "1.2.826.0.1.3680043.8.498."  # the root under which pydicom makes UIDs


def write_dicom(
    folder: Path, pixels: np.ndarray, mpp: float, downsamples: tuple[int, ...]
) -> list[Path]:
    """Write the levels of a slide; returns their files.

    Parameters
    ----------
    pixels: (height, width, 3) uint8.
    mpp: of ``pixels``, in µm/px.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for downsample in downsamples:
        path = folder / f"level{len(paths)}.dcm"
        level = pixels[::downsample, ::downsample]
        _level(level, mpp * downsample, downsample > 1).save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def _level(pixels: np.ndarray, mpp: float, is_resampled: bool) -> FileDataset:
    height, width = pixels.shape[:2]
    rows, columns = -(-height // SIDE), -(-width // SIDE)
    padded = np.full((rows * SIDE, columns * SIDE, 3), 255, np.uint8)
    padded[:height, :width] = pixels
    frames = [
        cv2.imencode(".jpg", np.ascontiguousarray(frame[..., ::-1]))[1].tobytes()
        for frame in padded.reshape(rows, SIDE, columns, SIDE, 3)
        .swapaxes(1, 2)
        .reshape(-1, SIDE, SIDE, 3)
    ]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    meta.MediaStorageSOPInstanceUID = f"{PREFIX}{2 + is_resampled}"
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    level = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    level.SOPClassUID = meta.MediaStorageSOPClassUID
    level.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    level.StudyInstanceUID = level.SeriesInstanceUID = f"{PREFIX}1"
    level.Modality = "SM"
    level.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED" if is_resampled else "NONE"]
    level.DimensionOrganizationType = "TILED_FULL"
    level.TotalPixelMatrixColumns, level.TotalPixelMatrixRows = width, height
    level.Columns = level.Rows = SIDE
    level.NumberOfFrames = len(frames)
    level.SamplesPerPixel, level.PlanarConfiguration = 3, 0
    level.PhotometricInterpretation = "YBR_FULL_422"
    level.BitsAllocated = level.BitsStored = 8
    level.HighBit, level.PixelRepresentation = 7, 0
    measures = Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]  # mm
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    level.SharedFunctionalGroupsSequence = [shared]
    level.PixelData = encapsulate(frames)
    level["PixelData"].VR = "OB"
    return level
