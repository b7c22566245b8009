/** The CLIP models of the page. The template's `ModelName` says which there are. */
export enum ClipModel {
  VIT_B_32 = 'ViT-B/32',
  VIT_B_16 = 'ViT-B/16',
  VIT_L_14 = 'ViT-L/14',
}
